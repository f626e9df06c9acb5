"""What becomes of the final tokens: means by size, and the query that attends to them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.models.pooling import mean_of_patches
from tests.small_models import KINDS, build, loud_parameters
from tests.vit_reference import Reference

CONFIG = dataclasses.replace(KINDS["siglip"], depth=1, pool_heads=4, pool_mlp_width=24)


def test_mean_of_patches_by_hand():
    patches = jnp.array([[[1.0, 0], [2, 8], [6, 4]]])
    np.testing.assert_allclose(mean_of_patches(patches, None), [[3, 4]])
    sizes = jnp.array([[1.0, 3, 0]])
    np.testing.assert_allclose(mean_of_patches(patches, sizes), [[1.75, 6]])


@pytest.fixture(scope="module")
def pool():
    parameters = loud_parameters(CONFIG)
    model = build(CONFIG, parameters, method="dense")
    return model.pool, Reference(CONFIG, parameters)


TOKENS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, CONFIG.width)), jnp.float32)


@pytest.mark.parametrize("sizes", [None, [1, 1, 1, 1, 1, 1], [3, 1, 0, 2, 0, 7]])
def test_attention_pool_equals_the_formula(pool, sizes):
    module, reference = pool
    given = None if sizes is None else jnp.array([sizes] * 2, jnp.float32)
    weights = np.array(sizes or [1] * 6)
    expected = [reference.attention_pool(np.float64(tokens), weights) for tokens in TOKENS]
    np.testing.assert_allclose(module(TOKENS, given), expected, atol=2e-5)


def test_a_token_of_size_2_counts_like_two(pool):
    module, _ = pool
    twice = jnp.concatenate([TOKENS, TOKENS[:, :1]], axis=1)
    sizes = jnp.ones((2, 6)).at[:, 0].set(2)
    np.testing.assert_allclose(module(TOKENS, sizes), module(twice, None), atol=2e-5)
    hidden = jnp.ones((2, 6)).at[:, 5].set(0)
    np.testing.assert_allclose(module(TOKENS, hidden), module(TOKENS[:, :5], None), atol=2e-5)
