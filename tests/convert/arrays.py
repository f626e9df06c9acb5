"""Arrays of files of weights, and of state dicts and trees, compared."""

import numpy as np
from rich.progress import Progress

from hvit_jax.convert.reader import read_state_dict


def arrays(path):
    """Read those of a file or folder that are usable, by their keys."""
    read = read_state_dict(path, Progress(disable=True))
    return {key: read.read(key) for key in read.shapes if key not in read.flaws}


def assert_same_arrays(first, second):
    """Compare two dicts of arrays."""
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
