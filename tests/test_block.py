"""The parts of a transformer block that JAX does not have as we need them."""

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.models.block import gelu


def test_gelu_equals_that_of_jax():
    x = jnp.linspace(-9, 9, 1001)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    slopes = (jax.vmap(jax.grad(f))(x) for f in (gelu, lambda y: jax.nn.gelu(y, approximate=False)))
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_gelu_rounds_once_in_bfloat16():
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.bfloat16)
    exact = gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gelu(x), exact)
