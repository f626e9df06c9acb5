"""Whose attention scores the patches, with and without CLS, and registers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hvit_jax.config import Compute
from hvit_jax.models.block import Block
from hvit_jax.ops.sampling import mean_rows
from tests.small_models import SMALL
from tests.vit_reference import attend, softmax

RNG = np.random.default_rng(0)
Q, K, V = (jnp.asarray(2 * RNG.normal(size=(2, 9, 2, 16)), jnp.float32) for _ in range(3))


def weights(image):
    """Attention weights of one image: (heads, queries, keys)."""
    q, k = (np.float64(each[image]).swapaxes(0, 1) for each in (Q, K))
    return softmax(q @ k.swapaxes(1, 2) / 4)


@pytest.mark.parametrize(
    ("class_token", "registers"), [(True, 0), (True, 3), (False, 3), (False, 0)]
)
def test_attention_that_scores_patches(class_token, registers):
    """CLS's, which is the first token, or the mean of the patches', not of the registers'."""
    config = dataclasses.replace(
        SMALL,
        **{"class_token": class_token, "registers": registers, "position_prefix": 0},
        **{} if class_token else {"pool": "avg"},
    )
    block = Block(config, compute=Compute(), rngs=nnx.Rngs(0))
    prefix = config.prefix_tokens
    attended, scores = block.attend_and_score_patches(Q, K, V, prefix=prefix)
    for image in range(2):
        rows = weights(image)[:, :1] if class_token else weights(image)[:, prefix:]
        np.testing.assert_allclose(scores[image], rows.mean((0, 1))[prefix:], atol=1e-6)
        flat = (np.float64(each[image]).reshape(9, -1) for each in (Q, K, V))
        expected = attend(*flat, heads=2)
        np.testing.assert_allclose(attended[image].reshape(9, -1), expected, atol=1e-5)


def test_mean_rows_of_ats():
    """The mean over those queries that count, of the keys that are there."""
    valid = jnp.arange(9)[None] < jnp.array([[9], [6]])
    queries = valid & (jnp.arange(9) >= 2)[None]
    found = mean_rows(Q, K, queries, valid, jnp.array([9, 6]))
    for image, count in enumerate((9, 6)):
        scores = np.log(weights(image)[:, :count, :count])
        expected = softmax(scores)[:, 2:].mean(1)
        np.testing.assert_allclose(found[image, :, :count], expected, atol=2e-6)
        assert not found[image, :, count:].any()
