"""What run.py of an export says of a model that makes maps."""

import numpy as np

from hvit_jax.exporting.classify import describe


def test_a_map_is_described_by_its_pixels():
    logits = np.zeros((2, 4, 3))
    logits[:, :3, 1] = 1
    logits[:, 3, 2] = 2
    assert describe(logits, ["sky", "tree", "road"]) == "tree 75.0 %, road 25.0 %"


def test_a_map_of_depth_is_described_by_its_range():
    depth = np.array([[[1.5], [2.25]]])
    assert describe(depth, []) == "1.5 to 2.25 m"
