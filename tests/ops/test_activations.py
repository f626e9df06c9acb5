"""Activations at points where their values are known; GELU has more tests in test_block.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.config import ViTConfig
from hvit_jax.ops.activations import ACTIVATIONS

# At -2, -0.5, 0, 1 and 3, to six digits.
VALUES = {
    "gelu": [-0.0455003, -0.154269, 0, 0.841345, 2.99595],
    "gelu_tanh": [-0.0454023, -0.154286, 0, 0.841192, 2.99636],
    "quick_gelu": [-0.0643414, -0.149612, 0, 0.845796, 2.98193],
    "silu": [-0.238406, -0.188770, 0, 0.731059, 2.85772],
}


def test_every_name_has_values():
    names = ViTConfig.__dataclass_fields__["activation"].metadata["choices"]
    assert set(names) == set(VALUES) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    found = ACTIVATIONS[name](jnp.array([-2.0, -0.5, 0, 1, 3]))
    np.testing.assert_allclose(found, VALUES[name], rtol=1e-5)


@pytest.mark.parametrize("name", ["quick_gelu", "silu"])
def test_rounds_once_in_bfloat16(name):
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.bfloat16)
    exact = ACTIVATIONS[name](x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ACTIVATIONS[name](x), exact)
