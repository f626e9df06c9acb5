"""ATS as a method of the model; the sampling itself is tested in test_sampling.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax.architectures import named_config
from tests.ats_reference import run_alone
from tests.published_rows import published, row_config, row_name, token_counts
from tests.small_models import build, compute_features, contrasts, sharp_parameters

make = functools.partial(build, method="ats")


@pytest.fixture(scope="module")
def parameters(small_config):
    class_token = jax.random.normal(jax.random.key(1), (small_config.width,))
    return {**sharp_parameters(small_config, 3), "class_token": class_token}


@pytest.fixture(scope="module")
def images(small_config):
    return contrasts(small_config)


@pytest.fixture(scope="module")
def free(small_config, parameters, images):
    """A model without budgets that scans its first two blocks, and what it makes of the images."""
    model = make(small_config, parameters, blocks=(0, 1, 3))
    assert [count for _, count in model.runs()] == [2, 1, 1]
    return model, compute_features(model, images)


@pytest.mark.parametrize(
    ("blocks", "max_tokens", "residual"),
    [
        ((0, 1, 3), (49, 49, 49), "normalized"),
        ((1,), (49,), "input"),
        ((0, 2), (30, 12), "normalized"),
    ],
)
def test_each_image_matches_numpy_alone(
    small_config, parameters, images, blocks, max_tokens, residual
):
    """Blocks between and after the sampling ones attend without padding, which no golden pins."""
    options = {"blocks": blocks, "max_tokens": max_tokens, "residual": residual}
    seen = compute_features(make(small_config, parameters, **options), images)
    lengths = [np.asarray(state.lengths) for state in seen.states]
    assert len(set(lengths[-1])) > 1 or max_tokens[-1] < 49, "images should differ in length"
    for index, image in enumerate(images):
        expected, patches = run_alone(small_config, parameters, image, **options)
        for block, tokens in enumerate(expected):
            assert lengths[block][index] == len(tokens)
            got = np.asarray(seen.tokens[block])[index, : len(tokens)]
            np.testing.assert_allclose(got, tokens, atol=1e-3, rtol=0)
        left = {int(patch): place for place, patch in enumerate(patches - 1)}
        source = np.asarray(seen.states[-1].source)[index]
        assert source.tolist() == [left.get(patch, -1) for patch in range(len(source))]


def test_rows_behind_the_tokens_are_zero_after_sampling(free):
    _, seen = free
    for block in (0, 1, 3):
        for tokens, length in zip(seen.tokens[block], seen.states[block].lengths, strict=True):
            tokens = np.asarray(tokens)
            assert tokens[:length].any(-1).all() and not tokens[length:].any()


def test_restore_gives_dropped_patches_their_last_value(free):
    model, seen = free
    before, after = seen.states[0], seen.states[1]
    restored = np.asarray(model.reducer.restore(seen.tokens[1], after))
    for image, (was, now) in enumerate(zip(before.source, after.source, strict=True)):
        for patch, (old, new) in enumerate(zip(was.tolist(), now.tolist(), strict=True)):
            tokens, place = (seen.tokens[1], new) if new >= 0 else (seen.tokens[0], old)
            value = before.dropped[image, patch] if old < 0 else tokens[image, place]
            np.testing.assert_array_equal(restored[image, patch], value)
        assert {True, False} == set((was >= 0).tolist()) == set((now[was >= 0] >= 0).tolist())


def test_counts_are_the_tokens_that_stay(free, small_config):
    model, seen = free
    assert model.reducer.budget_blocks(small_config) == (0, 1, 3)
    for state in seen.states:
        counts = model.reducer.counts(state)
        assert list(counts) == ["tokens"]
        np.testing.assert_array_equal(counts["tokens"][:, 0], state.lengths)


def test_scan_equals_unrolled(free, small_config, parameters, images):
    _, seen = free
    unrolled = make(small_config, parameters, blocks=(0, 1, 3), unroll=True)
    np.testing.assert_allclose(seen.output, hvit_jax.jit_model(unrolled)(images), atol=1e-4)


def test_images_over_budget_are_reported(free, small_config, parameters, images):
    needed = free[1].states[0].lengths
    budget = int(needed.max()) - 1
    model = make(small_config, parameters, blocks=(0, 2), max_tokens=(budget, 49))
    graph, state = nnx.split(model)
    report = jax.jit(lambda state: nnx.merge(graph, state).classify(images)[1])(state)
    expected = (needed > budget).astype(jnp.float32)
    assert list(report) == ["ats_images_over_budget"]
    np.testing.assert_array_equal(report["ats_images_over_budget"], expected)
    assert 0 < expected.sum() < len(images)


def test_a_budget_of_all_tokens_is_no_budget(small_config):
    default = hvit_jax.make_reducer("ats", blocks=(1, 2)).resolve(small_config)
    for budget in (49, 1000, (49, 77)):
        given = hvit_jax.make_reducer("ats", blocks=(1, 2), max_tokens=budget)
        assert given.resolve(small_config) == default


def test_budgets_do_not_grow_along_the_depth(small_config):
    reducer = hvit_jax.make_reducer("ats", blocks=(0, 2, 3), max_tokens=(20, 30, 9))
    layers = reducer.resolve(small_config).schedule(small_config)
    counts = [(layer.tokens_in, layer.tokens_out) for layer in layers]
    assert counts == [(49, 20), (20, 20), (20, 20), (20, 9)]


def test_bfloat16_stays_close(small_config, images):
    """Roundings change some choices between tokens of nearly equal scores."""
    exact, rounded = (
        compute_features(hvit_jax.create(small_config, "ats", dtype=dtype, blocks=(2,)), images)
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.tokens[-1].dtype == jnp.bfloat16
    lengths = [np.asarray(seen.states[-1].lengths) for seen in (exact, rounded)]
    np.testing.assert_allclose(*lengths, atol=3, rtol=0)
    error = np.linalg.norm(exact.output - rounded.output, axis=-1)
    assert (error < 0.15 * np.linalg.norm(exact.output, axis=-1)).all()


@pytest.mark.parametrize("padding", ["none", "batch"])
def test_gradients_are_finite(small_config, images, padding):
    config = dataclasses.replace(small_config, depth=2)
    options = {"blocks": (0, 1), "max_tokens": 30, "padding": padding}
    graph, state = nnx.split(hvit_jax.create(config, "ats", **options))
    loss = lambda state: jnp.square(nnx.merge(graph, state)(images)).sum()  # noqa: E731
    leaves = jax.tree.leaves(jax.jit(jax.grad(loss))(state))
    assert all(jnp.isfinite(leaf).all() for leaf in leaves)
    assert all(leaf.any() for leaf in leaves)


@pytest.mark.parametrize("row", published("ats"), ids=row_name)
class TestPublishedRows:
    def reducer(self, row):
        return hvit_jax.make_reducer("ats", max_tokens=row["mean_tokens_implied"], **row["args"])

    def test_tokens(self, row):
        config, first = row_config(row), row["args"]["blocks"][0]
        before = [config.num_patches + 1] * first
        after = [row["mean_tokens_implied"]] * (config.depth - first)
        assert token_counts(config, self.reducer(row)) == before + after

    def test_gflops(self, row):
        """The mean is rounded to a whole token, and stands for blocks that differ."""
        gflops = hvit_jax.count_flops(row_config(row), self.reducer(row)) / 1e9
        assert gflops == pytest.approx(row["published"]["gflops"], abs=0.1)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [("vit_b16", range(9, 12)), ("vit_l16", range(18, 24)), ("vit_h14", range(16, 32))],
)
def test_default_blocks(model, blocks):
    config = named_config(model)
    resolved = hvit_jax.make_reducer("ats").resolve(config)
    assert resolved.blocks == tuple(blocks)
    assert resolved.max_tokens == (config.num_patches + 1,) * len(blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ()}, "at least one block"),
        ({"blocks": (1, 4)}, "blocks are 0 to 3"),
        ({"blocks": (-1, 2)}, "blocks are 0 to 3"),
        ({"blocks": (2, 2)}, "ascending order, each once: \\(2,\\)"),
        ({"blocks": (2, 1)}, "ascending order, each once: \\(1, 2\\)"),
        ({"blocks": 2}, "a list of whole numbers"),
        ({"max_tokens": 1}, "at least 2"),
        ({"blocks": (1, 2), "max_tokens": (20, 0)}, "at least 2"),
        ({"blocks": (1, 2), "max_tokens": (20,)}, "each of 2 blocks"),
        ({"blocks": (1, 2), "max_tokens": ()}, "each of 2 blocks"),
        ({"max_tokens": 2.5}, "a whole number or a list"),
        ({"padding": "some"}, "none, batch, all"),
        ({"residual": "x"}, "normalized, input"),
        ({"padding": "all", "max_tokens": 20}, "keeps all 49 rows"),
    ],
)
def test_mistakes_are_reported_when_the_model_is_built(small_config, options, message):
    with pytest.raises(hvit_jax.InputError, match=message):
        hvit_jax.create(small_config, "ats", **options)
