"""Rounding to e4m3 and products of it, against NumPy's own in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hvit_jax import InputError
from hvit_jax.ops.attention import attend, hopper
from hvit_jax.ops.float8 import check_capability, powers_of_two, product, to_float8
from hvit_jax.ops.platform import compiled_for


def test_numbers_are_scaled_rounded_and_cut():
    x = jnp.asarray([0.0, 1.0, 1.0625, 1.1875, -500, jnp.inf, jnp.nan, 2**-10, 2**-9], jnp.bfloat16)
    found = to_float8(x, jnp.bfloat16(1))
    # Steps of 1/8 from 1 on, to the even one from the middle; 2^-9 is the least.
    expected = [0, 1, 1, 1.25, -448, 448, np.nan, 0, 2**-9]
    assert found.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)
    half = to_float8(jnp.asarray([[600.0, 2.0]]), jnp.asarray([[0.5, 4.0]]))
    np.testing.assert_array_equal(np.asarray(half, np.float32), [[288, 8]])


def test_attention_in_float8_is_that_of_its_result():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 8), jnp.bfloat16)
    factor = jnp.exp2(jnp.arange(24) % 9).astype(jnp.bfloat16)
    found, plain = attend(q, k, v, factor=factor), attend(q, k, v)
    expected = to_float8(plain.reshape(2, 5, 24), factor.reshape(1, 1, 24))
    np.testing.assert_array_equal(*(np.asarray(x, np.float32).ravel() for x in (found, expected)))


def test_powers_of_two_let_limits_fit():
    limits = jnp.asarray([1.0, 447, 449, 1e-6, 3e5])
    steps = np.asarray(powers_of_two(limits))
    assert np.all(np.log2(steps) % 1 == 0)
    assert np.all(limits / steps <= 448) and np.all(limits / steps > 448 / 4)
    assert powers_of_two(jnp.zeros(())) == 1


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_product_against_numpy(target):
    """As a CPU computes it, and as a GPU's program says it, whose result is in bfloat16."""
    draws = np.random.default_rng(0)
    x = draws.normal(0, 30, (2, 7, 64)).astype(ml_dtypes.float8_e4m3fn)
    kernel = draws.normal(0, 100, (24, 64)).astype(ml_dtypes.float8_e4m3fn)
    with compiled_for(target):
        found = product(jnp.asarray(x), jnp.asarray(kernel), jnp.float32(2**-12), jnp.bfloat16)
    expected = np.einsum("bnc,ec->bne", x.astype(np.float64), kernel.astype(np.float64)) / 2**12
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=2e-3)


def test_gradients_are_refused():
    with pytest.raises(InputError, match="'float8' gives no gradients; use 'bfloat16'"):
        jax.grad(lambda x: to_float8(x, jnp.float32(1)).astype(jnp.float32).sum())(jnp.ones(3))
    with pytest.raises(InputError, match="'float8' gives no gradients; use 'bfloat16'"):
        jax.grad(lambda x: hopper.attend(x, x, x, factor=jnp.ones(16)).astype(x.dtype).sum())(
            jnp.ones((1, 4, 1, 16))
        )


@pytest.mark.parametrize("capability", ["8.0", "8.6", "7.5", "gfx942", "unknown"])
def test_gpus_without_it_are_refused(capability):
    with pytest.raises(InputError, match=f"needs an NVIDIA GPU.* this one has {capability}; use"):
        check_capability(capability)


def test_gpus_with_it_are_taken():
    for capability in ("8.9", "9.0", "10.0", "12.0"):
        check_capability(capability)
