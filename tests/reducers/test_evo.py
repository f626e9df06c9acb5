"""Evo-ViT: the running score, who runs and who waits, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax import InputError
from hvit_jax.models.vit import segments
from hvit_jax.reducers import evo
from hvit_jax.reducers.evo import EvoState, EvoViT
from tests.published_rows import published, row_config, row_name, token_counts
from tests.small_models import block_of, compute_features, frozen

# Patches that a pruned block runs on, by model and ratio.
PROCESSED = {
    ("vit_l16", 0.6): 614,
    ("vit_l16", 0.4): 409,
    ("vit_h14", 0.6): 821,
    ("vit_h14", 0.5): 684,
    ("vit_h14", 0.3): 410,
}


def make(config, **options):
    settings = {"prune_location": 2, "prune_ratio": 0.5, **options}
    return hvit_jax.create(config, "evo", seed=1, **settings)


@pytest.mark.parametrize("row", published("evo"), ids=row_name)
class TestPublishedRows:
    def test_flops(self, row):
        counted = hvit_jax.count_flops(row_config(row), EvoViT(**row["args"])) / 1e9
        assert counted == pytest.approx(row["gflops"], abs=0.005)

    def test_tokens(self, row):
        config, reducer = row_config(row), EvoViT(**row["args"])
        assert token_counts(config, reducer) == [config.num_patches + 1] * config.depth
        runs = segments(reducer.resolve(config).schedule(config))
        location = row["args"]["prune_location"]
        assert [count for _, count in runs] == [1, location - 1, config.depth - location]
        processed = PROCESSED[row["model"], row["args"]["prune_ratio"]]
        assert [layer.processed for layer, _ in runs] == [config.num_patches] * 2 + [processed]


@pytest.mark.parametrize(
    ("name", "location", "ratio"),
    [("vit_b16", 4, 0.5), ("vit_l16", 8, 0.6), ("vit_h14", 14, 0.5)],
)
def test_defaults_are_those_of_the_tables(name, location, ratio):
    assert EvoViT().resolve(hvit_jax.MODELS[name]) == EvoViT(location, ratio, 0.5)


def test_defaults_of_other_sizes(small_config):
    assert EvoViT().resolve(small_config) == EvoViT(1, 0.5, 0.5)
    assert EvoViT(prune_location=3).resolve(small_config) == EvoViT(3, 0.5, 0.5)
    assert EvoViT(prune_ratio=0.25).resolve(small_config) == EvoViT(1, 0.25, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_location": 0}, "prune_location=0: at least 1, .* the last block is 3"),
        ({"prune_location": 4}, "prune_location=4: .* the last block is 3"),
        ({"prune_location": 1.5}, "prune_location must be a whole number, got 1.5"),
        ({"prune_ratio": 0.0}, "prune_ratio=0.0: above 0 and at most 1"),
        ({"prune_ratio": 1.01}, "prune_ratio=1.01: above 0 and at most 1"),
        (
            {"prune_ratio": 0.02},
            "prune_ratio=0.02: leaves none of 48 patch tokens; at least 0.0209",
        ),
        ({"tradeoff": -0.1}, "tradeoff=-0.1: between 0 and 1"),
        ({"tradeoff": 1.1}, "tradeoff=1.1: between 0 and 1"),
    ],
)
def test_wrong_options(small_config, options, message):
    with pytest.raises(InputError, match=message):
        make(small_config, **options)


def test_running_on_all_tokens_is_dense(small_config, images):
    dense = compute_features(hvit_jax.create(small_config, seed=1), images)
    model = make(small_config, prune_ratio=1, tradeoff=1)
    features = compute_features(model, images)
    np.testing.assert_allclose(features.output, dense.output, atol=2e-5)
    for tokens, state, expected in zip(features.tokens, features.states, dense.tokens, strict=True):
        restored = model.reducer.restore(tokens, state)
        np.testing.assert_allclose(restored, expected[:, 1:], atol=2e-5)


def test_sorting_by_hand():
    x = jnp.array([[[9.0], [1.0], [2.0], [3.0], [4.0]]])
    state = EvoState(
        source=jnp.array([[2, 1, 4, 3]], jnp.int32),
        dropped=jnp.zeros((1, 4, 1)),
        coordinates=None,
        prefix=1,
        scores=jnp.array([[0.25, 0.75, 0.5, 0.75]]),
    )
    moved, order, sorted_state = evo._sort(x, state)
    assert moved[0, :, 0].tolist() == [9, 2, 4, 3, 1] and order.tolist() == [[0, 1, 2, 3]]
    assert sorted_state.scores.tolist() == [[0.75, 0.75, 0.5, 0.25]]
    assert sorted_state.source.tolist() == [[1, 4, 2, 3]]
    untraced = EvoState(
        None, None, None, 1, state.scores, order=jnp.array([[2, 0, 3, 1]], jnp.int32)
    )
    stayed, order, sorted_state = evo._sort(x, untraced)
    assert stayed is x and order.tolist() == [[0, 1, 3, 2]]
    assert sorted_state.order.tolist() == order.tolist()
    assert sorted_state.scores.tolist() == [[0.75, 0.75, 0.5, 0.25]]


def test_a_trace_changes_nothing(small_config, images):
    """Traced tokens are sorted, others stay in their places."""
    model = hvit_jax.ViT(small_config, EvoViT(prune_location=1), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(images), compute_features(model, images).output, atol=1e-6)


@pytest.mark.parametrize("tradeoff", [0.5, 0.2])
def test_scores_and_placeholders_follow_the_rule(small_config, images, tradeoff):
    model = make(small_config, prune_location=1, tradeoff=tradeoff, unroll=True)
    features = compute_features(model, images)
    for index in range(1, small_config.depth):
        before, after = features.tokens[index - 1], np.asarray(features.tokens[index])
        old = np.asarray(features.states[index - 1].scores)
        order = np.argsort(-old, axis=1, kind="stable")
        ordered = np.take_along_axis(np.asarray(before)[:, 1:], order[..., None], axis=1)
        np.testing.assert_array_equal(after[:, 25:], ordered[:, 24:])
        active = jnp.concatenate([before[:, :1], ordered[:, :24]], axis=1)
        block = block_of(model, index)
        np.testing.assert_allclose(after[:, :25], block(active), atol=2e-5)
        q, k, _ = (np.asarray(each.array) for each in block.qkv(active))
        weights = np.exp(np.einsum("bhd,bmhd->bhm", q[:, 0], k) / np.sqrt(q.shape[-1]))
        new = (weights / weights.sum(-1, keepdims=True)).mean(1)[:, 1:]
        expected = np.take_along_axis(old, order, axis=1)
        expected[:, :24] = (1 - tradeoff) * expected[:, :24] + tradeoff * new
        np.testing.assert_allclose(features.states[index].scores, expected, atol=1e-6)


def test_first_scores_are_the_class_tokens_attention(small_config, images):
    model = make(small_config, prune_location=3, unroll=True)
    features = compute_features(model, images)
    # The state after block 1 is the running mean, from which block 1's own attention follows.
    q, k, _ = (np.asarray(x.array) for x in block_of(model, 1).qkv(features.tokens[0]))
    weights = np.exp(np.einsum("bhd,bmhd->bhm", q[:, 0], k) / np.sqrt(q.shape[-1]))
    second = (weights / weights.sum(-1, keepdims=True)).mean(1)[:, 1:]
    first = np.asarray(features.states[0].scores)
    assert (first > 0).all() and (first.sum(1) < 1).all()
    np.testing.assert_allclose(features.states[1].scores, (first + second) / 2, atol=1e-6)


def test_no_patch_is_ever_lost(small_config, images):
    model = frozen(make(small_config, prune_location=1, prune_ratio=0.3))
    features = compute_features(model, images)
    patches = features.tokens[0][:, 1:]
    for tokens, state in zip(features.tokens, features.states, strict=True):
        np.testing.assert_array_equal(model.reducer.restore(tokens, state), patches)
        assert np.sort(state.source, axis=1).tolist() == [list(range(1, 49))] * 3
    assert not np.array_equal(features.states[-1].source, features.states[0].source)


def test_scores_stay_in_float32(small_config, images):
    graph, weights = nnx.split(make(small_config, dtype="bfloat16"))

    def scores(weights, images):
        return [state.scores for state in nnx.merge(graph, weights).features(images).states]

    types = {each.dtype.name for each in jax.eval_shape(scores, weights, images)}
    assert types == {"float32"}
