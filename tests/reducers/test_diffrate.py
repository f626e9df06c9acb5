"""DiffRate: sorting, pruning and merging by given counts, and the published ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.architectures import named_config
from hvit_jax.reducers import DiffRate
from hvit_jax.reducers.diffrate import DiffRateState, published_counts, scaled_counts
from tests.golden import Goldens

CONFIG = hvit_jax.ViTConfig((4, 5), 1, depth=4, width=4, heads=1, mlp_width=4)


def state_of(x, weights):
    """A traced state before the first merge, but for the weights."""
    images, tokens = weights.shape
    places = jnp.broadcast_to(jnp.arange(1, tokens), (images, tokens - 1))
    return DiffRateState(places, 0 * x[:, 1:], None, 1, jnp.ones_like(weights), weights)


@pytest.mark.parametrize("name", Goldens().cases("diffrate"))
def test_parity_reduction(name, goldens):
    case = goldens.case(name)
    pruned, left = min(case["x"].shape[1], int(case["prune_kept"])), int(case["merge_kept"])

    @jax.jit
    def reduce(x, scores, weights):
        x, state = DiffRate()._keep(x, scores, state_of(x, weights), pruned)
        return DiffRate()._merge(x, state, left) if left < pruned else (x, state)

    scores = case["attention"][:, :, 0, 1:].mean(1)
    x, state = reduce(*map(jnp.asarray, (case["x"], scores, case["size"][..., 0])))
    np.testing.assert_allclose(x, case["out"], atol=2e-6)
    np.testing.assert_allclose(state.weights, case["out_size"][..., 0], rtol=1e-5)
    held = np.asarray(state.source)[:, None] == np.arange(x.shape[1])[:, None]
    np.testing.assert_array_equal(held, case["source"][..., 1:])
    np.testing.assert_array_equal(state.sizes[:, 1:], held[:, 1:].sum(2))


@pytest.mark.parametrize("weighted", [False, True])
def test_merging_by_hand(weighted):
    """The last patch is most like the first one, by a cosine of 0.6."""
    x = jnp.array([[[9.0, 9], [5, 0], [0, -1], [3, 4]]])
    merged, state = DiffRate(weighted=weighted)._merge(
        x, state_of(x, jnp.array([[1.0, 1, 5, 3]])), 3
    )
    mean = [3.5, 3] if weighted else [4, 2]
    np.testing.assert_allclose(merged[0], [[9, 9], mean, [0, -1]], rtol=1e-6)
    np.testing.assert_allclose(state.weights[0], [1, 1 + 3 * 0.6, 5], rtol=1e-6)
    assert state.sizes[0].tolist() == [1, 2, 1] and state.source[0].tolist() == [1, 2, 1]


def test_a_mean_is_not_weighted_by_a_weight_below_0():
    """Weights of 1 and -1 would have a sum of 0; the second counts 1e-6."""
    x = jnp.array([[[9.0, 9], [1, 0], [2, 0]]])
    merged, _ = DiffRate(weighted=True)._merge(x, state_of(x, jnp.array([[1.0, 1, -1]])), 2)
    np.testing.assert_allclose(merged[0], [[9, 9], [1, 0]], atol=2e-6)


def test_a_weight_that_falls_below_0_is_kept():
    """Attention takes its logarithm from 1e-6 on; see `TestContract` for finite results."""
    x = jnp.array([[[9.0, 9], [1, 0], [-1, 0.0]]])
    _, state = DiffRate()._merge(x, state_of(x, jnp.array([[1.0, 1, 3]])), 2)
    assert state.weights[0].tolist() == [1, -2]


def test_published_counts_of_their_own_model():
    config = hvit_jax.ViTConfig(224, 16, depth=12, width=768, heads=12, mlp_width=3072)
    found = published_counts()["ViT-B-DeiT"]["11.5"]
    expected = tuple(found["prune_kept"]), tuple(found["merge_kept"])
    assert scaled_counts("ViT-B-DeiT:11.5", config) == expected
    resolved = DiffRate().resolve(config)
    assert (resolved.prune_kept, resolved.merge_kept) == expected
    # A head that reads patches takes MAE's, which keep more of them.
    pooled = dataclasses.replace(config, pool="avg")
    assert DiffRate().resolve(pooled) == DiffRate(counts="ViT-B-MAE:11.5").resolve(pooled)


def test_published_counts_on_another_grid():
    """577 tokens of SWAG's ViT-B/16: patches grow by 576 / 196, CLS does not."""
    resolved = DiffRate(counts="ViT-B-DeiT:11.5").resolve(named_config("vit_b16"))
    found = published_counts()["ViT-B-DeiT"]["11.5"]["merge_kept"]
    assert resolved.merge_kept == tuple(max(2, 1 + round((k - 1) * 576 / 196)) for k in found)


def test_r_merges_as_many_in_every_block():
    layers = DiffRate(r=3).resolve(CONFIG).schedule(CONFIG)
    assert [layer.tokens_out for layer in layers] == [18, 15, 12, 9]
    assert [layer.mode == "sort" for layer in layers] == [True, False, False, False]


def test_lists_may_rise():
    """What a list would keep beyond the tokens that there are changes nothing."""
    lists = {"prune_kept": (21, 20, 99, 9), "merge_kept": (15, 18, 18, 12)}
    layers = DiffRate(**lists).resolve(CONFIG).schedule(CONFIG)
    assert [(layer.pruned, layer.tokens_out) for layer in layers] == [
        *[(21, 15), (15, 15), (15, 15), (9, 9)]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": "ViT-B-DeiT:11.5", "r": 3}, "give one of counts, r, or prune_kept with"),
        ({"prune_kept": (9,) * 4}, "prune_kept and merge_kept go together"),
        ({"counts": "ViT-B-DeiT:11"}, "ViT-B-DeiT:11.5"),
        ({"prune_kept": (9,) * 3, "merge_kept": (9,) * 4}, "one number for each of 4 blocks"),
        ({"counts": "ViT-B-DeiT:11.5"}, "one number for each of 4 blocks"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(InputError, match=message):
        DiffRate(**options).resolve(CONFIG)
