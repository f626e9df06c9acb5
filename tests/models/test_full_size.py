"""Full-size models in float32, one image a method; minutes, so `pytest -m slow` runs them."""

import numpy as np
import pytest

from tests.full_size import FILE, forward

# Far above what one machine needs: to notice a method that compiles or keeps many times as much.
COMPILE_SECONDS = {"tome": 240}
OTHERS_COMPILE_SECONDS = 90
BYTES = {"vit_l16": 300e6, "vit_h14": 600e6}


@pytest.mark.slow
@pytest.mark.parametrize("case", np.load(FILE).files)
def test_logits_memory_and_compilation(case):
    model, method = case.split("/")
    logits, seconds, planned = forward(model, method)
    expected = np.load(FILE)[case]
    np.testing.assert_allclose(logits, expected, atol=1e-4 * expected.std())
    assert seconds < COMPILE_SECONDS.get(method, OTHERS_COMPILE_SECONDS)
    assert planned < BYTES[model]
