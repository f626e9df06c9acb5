"""Tokens before the patches, sizes and rotary places of the patches, by hand, without a model."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.models.reducer import Layer
from hvit_jax.ops.clustering import cluster_labels, cluster_tokens
from hvit_jax.ops.merging import merge_tokens
from hvit_jax.reducers import EViT, ToMe
from hvit_jax.reducers.evit import EViTState
from hvit_jax.reducers.merging import MergeState

PATCHES = 7


def merge(x, *given):
    merged, sizes = merge_tokens(x, *given)
    return merged, sizes, merged


# A block whose LayerNorm changes nothing.
BLOCK = SimpleNamespace(merge=merge)


def matched(metric, prefix, r):
    """Which patches merge into which, in plain loops: {patch: patch}, and who stays of A."""
    tokens = range(len(metric))
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    a, b = ([i for i in tokens if i >= prefix and i % 2 == odd] for odd in (0, 1))
    best = {i: max(b, key=lambda j, i=i: unit[i] @ unit[j]) for i in a}
    ranked = sorted(a, key=lambda i: -(unit[i] @ unit[best[i]]))
    return {i: best[i] for i in ranked[:r]}, ranked[r:], b


@pytest.mark.parametrize("rope", ["mean", "destination"])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tome_keeps_what_stands_before_the_patches(prefix, rope):
    """Then come the tokens of A that stay, and B: turns are taken over all tokens."""
    rng = np.random.default_rng(prefix)
    count = prefix + PATCHES
    metric, x = rng.normal(size=(count, 4)), rng.normal(size=(count, 3))
    # The tokens before the patches are like all others, if they were asked.
    metric[:prefix] = metric[prefix]
    sizes, places = np.ones(count), rng.normal(size=(PATCHES, 2))
    sizes[prefix:] = rng.integers(1, 5, PATCHES)
    pairs, stay, b = matched(metric, prefix, 2)
    # With a token before the patches in A, its kept tokens stay in their order.
    stay = sorted(stay) if prefix % 2 else stay
    rows = [*range(prefix), *stay, *b]
    holds = [[row, *(i for i, target in pairs.items() if target == row)] for row in rows]
    means = [np.average(x[held], axis=0, weights=sizes[held]) for held in holds]
    state = MergeState(
        **{"source": jnp.arange(prefix, count)[None], "dropped": jnp.zeros((1, PATCHES, 3))},
        **{"coordinates": jnp.asarray(places[None], jnp.float32), "prefix": prefix},
        sizes=jnp.asarray(sizes[None], jnp.float32),
    )
    arrays = (jnp.asarray(each[None], jnp.float32) for each in (x, metric))
    merged, _, state = ToMe(rope=rope)._merge(BLOCK, *arrays, state, r=2)
    np.testing.assert_allclose(merged[0], means, atol=1e-5)
    np.testing.assert_allclose(state.sizes[0], [sizes[held].sum() for held in holds])
    source = [next(row for row, held in enumerate(holds) if i in held) for i in range(count)]
    assert state.source[0].tolist() == source[prefix:]
    padded = np.concatenate([np.zeros((prefix, 2)), places])
    expected = [
        np.average(padded[held], axis=0, weights=sizes[held]) if rope == "mean" else padded[held[0]]
        for held in holds
    ]
    np.testing.assert_allclose(state.coordinates[0], expected[prefix:], atol=1e-5)


def test_tome_before_the_first_merge_takes_the_places_that_all_images_share():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 4)), jnp.float32)
    state = MergeState(None, None, jnp.arange(14.0).reshape(1, 7, 2), 1, jnp.ones((3, 8)))
    *_, state = ToMe()._merge(BLOCK, x, x, state, r=1)
    assert state.coordinates.shape == (3, 6, 2)
    np.testing.assert_allclose(
        (state.coordinates * state.sizes[:, 1:, None]).sum(1), [[42, 49]] * 3
    )


def test_evit_puts_the_fused_token_at_the_mean_of_its_patches_by_score():
    places = jnp.array([[[0.0, 0], [1, 0], [2, 4], [3, 0], [4, 8]]])
    sizes = jnp.array([[1.0, 1, 1, 3, 1]])
    x = jnp.arange(7.0).reshape(1, 7, 1)
    state = EViTState(None, None, places, 2, sizes)
    scores = jnp.array([[0.1, 0.3, 0.1, 0.4, 0.3]])
    tokens, state = EViT(fuse_token=True)._select(x, scores, state, Layer(7, 6, "drop"))
    # Patches 3, 1 and 4 stay; 0 and 2 are fused, with equal scores.
    np.testing.assert_allclose(tokens[0, :, 0], [0, 1, 5, 3, 6, 0.1 * 2 + 0.1 * 4], rtol=1e-6)
    np.testing.assert_allclose(state.coordinates[0], [[3, 0], [1, 0], [4, 8], [1, 2]], rtol=1e-6)
    np.testing.assert_allclose(state.sizes[0], [3, 1, 1, 2])
    scores = jnp.array([[0.1, 0.4, 0.2, 0.3]])
    _, state = EViT(fuse_token=True)._select(tokens, scores, state, Layer(6, 5, "drop"))
    # What was fused before is a token like others, at its place and of its size.
    expected = [[1, 0], [1, 2], (np.array([3, 0]) * 0.1 + np.array([4, 8]) * 0.2) / 0.3]
    np.testing.assert_allclose(state.coordinates[0], expected, rtol=1e-6)
    np.testing.assert_allclose(state.sizes[0], [1, 2, 4])


def test_evit_without_fusing_keeps_places():
    places = jnp.array([[[0.0, 0], [1, 0], [2, 4]]])
    state = EViTState(None, None, places, 0)
    x = jnp.ones((2, 3, 1))
    scores = jnp.array([[0.1, 0.3, 0.2], [0.3, 0.1, 0.2]])
    _, state = EViT()._select(x, scores, state, Layer(3, 2, "drop"))
    assert state.coordinates.tolist() == [[[1, 0], [2, 4]], [[0, 0], [2, 4]]]
    assert state.sizes is None


def test_hourglass_puts_centroids_at_the_mean_of_their_patches():
    """Patches far apart: weights are 1 and 0, and one patch joins its neighbours' centroid."""
    x = jnp.array([[[0.0], [20], [0], [0]]])
    places = jnp.array([[[0.0, 0], [0, 1], [1, 0], [1, 1]]])
    centroids, coordinates = cluster_tokens(x, grid=(2, 2), clusters=(1, 2), places=places)
    np.testing.assert_allclose(centroids[0], [[0], [20]], atol=1e-5)
    np.testing.assert_allclose(coordinates[0], [[2 / 3, 1 / 3], [0, 1]], atol=1e-5)
    assert cluster_labels(x, centroids).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("iters", [1, 3])
def test_hourglass_averages_places_as_it_averages_features(iters):
    """Coordinates that are channels of the features, too, come out as these."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(2, 12, 2)).astype(np.float32)
    x = jnp.asarray(np.concatenate([rng.normal(size=(2, 12, 3)), places], axis=2), jnp.float32)
    options = {"grid": (3, 4), "clusters": (2, 2), "iters": iters, "temperature": 0.3}
    centroids, coordinates = cluster_tokens(x, places=jnp.asarray(places), **options)
    np.testing.assert_allclose(coordinates, centroids[..., 3:], atol=1e-6)
    alone, none = cluster_tokens(x, **options)
    assert none is None
    np.testing.assert_allclose(centroids, alone, atol=1e-6)
