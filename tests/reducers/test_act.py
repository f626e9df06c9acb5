"""ACT in a model; its operations are tested in test_hashing and test_grouping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax.ops.grouping import group_tokens
from hvit_jax.reducers import make_reducer
from tests.small_models import (
    block_of,
    build,
    classify,
    compute_features,
    contrasts,
    sharp_parameters,
)

TOKENS, HEADS = 49, 2


make = functools.partial(build, method="act")


@pytest.fixture(scope="module")
def parameters(small_config):
    return sharp_parameters(small_config, 6)


@pytest.fixture(scope="module")
def images(small_config):
    return contrasts(small_config)


def clusters_of_block(model, x, index, *, keys=False):
    """Count the clusters of every image and head in one block of an unrolled model."""
    draws, block = model.reducer.draws(model.config)[index], block_of(model, index)

    @jax.jit
    def count(x):
        q, k, _ = (each.array for each in block.qkv(x))
        pair = (k, draws.keys) if keys else (q * q.shape[-1] ** -0.5, draws.queries)
        return group_tokens(*pair, max_groups=TOKENS).distinct

    return np.asarray(count(x))


class TestEqualities:
    def test_grouping_nothing_is_dense(self, small_config, parameters, images):
        dense = make(small_config, parameters, method="dense")
        nothing = make(small_config, parameters, group_queries=False)
        assert nothing.reducer.draws(small_config) == (None,) * 4
        np.testing.assert_array_equal(
            hvit_jax.jit_model(nothing)(images), hvit_jax.jit_model(dense)(images)
        )

    @pytest.mark.parametrize("group_keys", [False, True])
    def test_as_many_slots_as_clusters_are_exact(
        self, small_config, parameters, images, group_keys
    ):
        options = {"q_hashes": 3, "group_keys": group_keys, "k_hashes": 2}
        free = make(small_config, parameters, **options)
        found = max(int(state.clusters.max()) for state in compute_features(free, images).states)
        assert 4 < found < TOKENS
        enough = make(small_config, parameters, **options, max_clusters=found)
        logits, report = classify(enough, images)
        np.testing.assert_allclose(logits, hvit_jax.jit_model(free)(images), atol=5e-5)
        np.testing.assert_array_equal(report["act_over_budget_heads"], [0, 0, 0])

    def test_more_slots_than_tokens_change_nothing(self, small_config, parameters, images):
        free, wide = (make(small_config, parameters, max_clusters=m) for m in (None, 10_000))
        np.testing.assert_array_equal(
            hvit_jax.jit_model(free)(images), hvit_jax.jit_model(wide)(images)
        )

    def test_tokens_that_are_alone_in_their_cluster_attend_as_usual(
        self, small_config, parameters, images
    ):
        """With 32 hashes of large queries all clusters are single tokens."""
        sharp = {**parameters, "blocks": {**parameters["blocks"]}}
        kernel = 10 * parameters["blocks"]["in_proj"]["kernel"]
        sharp["blocks"]["in_proj"] = {**parameters["blocks"]["in_proj"], "kernel": kernel}
        model = make(small_config, sharp, q_hashes=32)
        seen = compute_features(model, images[2:])
        assert [int(state.clusters[0]) for state in seen.states] == [TOKENS] * 4
        dense = hvit_jax.jit_model(make(small_config, sharp, method="dense"))
        np.testing.assert_allclose(seen.output, dense(images[2:]), atol=1e-4)

    def test_an_image_alone_equals_itself_in_a_batch(self, small_config, parameters, images):
        options = {"q_hashes": 6, "group_keys": True, "k_hashes": 6, "max_clusters": 9}
        forward = hvit_jax.jit_model(make(small_config, parameters, **options))
        alone = np.concatenate([forward(image[None]) for image in images])
        np.testing.assert_allclose(forward(images), alone, atol=5e-5)

    def test_scan_equals_unrolled(self, small_config, parameters, images):
        options = {"q_hashes": 6, "max_clusters": 12, "first_block": 1}
        scanned = make(small_config, parameters, **options)
        unrolled = make(small_config, parameters, unroll=True, **options)
        assert len(scanned.segments) == 2 and len(unrolled.segments) == 4
        pair = [classify(model, images) for model in (scanned, unrolled)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *pair)
        assert pair[0][1]["act_over_budget_heads"].sum() > 0

    def test_bfloat16_stays_close(self, small_config, parameters, images):
        exact, rough = (
            compute_features(make(small_config, parameters, q_hashes=2, dtype=dtype), images)
            for dtype in ("float32", "bfloat16")
        )
        assert rough.tokens[-1].dtype == jnp.bfloat16
        np.testing.assert_allclose(exact.states[0].clusters, rough.states[0].clusters, atol=4)
        # Rounding moves some queries to another cluster, and with it their token.
        change = np.square(exact.tokens[0] - rough.tokens[0]).mean()
        assert change < 0.02 * np.square(exact.tokens[0]).mean()
        assert np.isfinite(rough.output).all()


class TestBudgets:
    def test_counts_and_report(self, small_config, parameters, images):
        """Both clusterings of both active blocks count, for every head."""
        options = {"first_block": 1, "last_block": 2, "q_hashes": 4, "k_hashes": 4}
        model = make(
            small_config, parameters, unroll=True, group_keys=True, max_clusters=(22, 30), **options
        )
        seen = compute_features(model, images)
        over = np.zeros(3)
        for block, budget in ((1, 22), (2, 30)):
            x = seen.tokens[block - 1]
            found = [clusters_of_block(model, x, block, keys=keys) for keys in (False, True)]
            over += sum((each > budget).sum(1) for each in found)
            most = np.max(found, axis=(0, 2))
            np.testing.assert_array_equal(seen.states[block].clusters, most)
            counts = model.reducer.counts(seen.states[block])
            np.testing.assert_array_equal(counts["clusters"][:, 0], most)
        assert 0 < over.sum() < over.size * 2 * 2 * HEADS
        report = classify(model, images)[1]
        np.testing.assert_array_equal(report["act_over_budget_heads"], over)
        assert model.reducer.budget_blocks(small_config) == (1, 2)

    def test_a_smaller_budget_changes_the_result_but_not_its_shape(
        self, small_config, parameters, images
    ):
        free, tight = (
            hvit_jax.jit_model(make(small_config, parameters, max_clusters=budget))(images)
            for budget in (None, 2)
        )
        assert np.isfinite(tight).all() and tight.shape == free.shape
        assert np.abs(tight - free).max() > 1e-3

    def test_gradients_are_finite_where_slots_are_empty(self, small_config, parameters, images):
        model = make(small_config, parameters, q_hashes=3, group_keys=True, k_hashes=3)
        graph, state = nnx.split(model)

        @jax.jit
        def slopes(state, images):
            return jax.grad(lambda s: jnp.square(nnx.merge(graph, s)(images)).sum())(state)

        for leaf in jax.tree.leaves(slopes(state, images)):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0

    def test_blocks_with_different_budgets(self, small_config):
        reducer = make_reducer("act", max_clusters=[20, 20, 10, 99]).resolve(small_config)
        layers = reducer.schedule(small_config)
        assert [layer.clusters for layer in layers] == [20, 20, 10, TOKENS]


class TestDraws:
    def test_fixed_by_the_seed_and_different_in_every_block(self, small_config):
        reducer = make_reducer("act", q_hashes=5, first_block=1, last_block=2)
        first, again = (reducer.resolve(small_config).draws(small_config) for _ in range(2))
        assert [entry is None for entry in first] == [True, False, False, True]
        assert first[1].queries.projection.shape == (16, 5) and first[1].keys is None
        jax.tree.map(np.testing.assert_array_equal, first, again)
        other = (
            make_reducer("act", q_hashes=5, hash_seed=1).resolve(small_config).draws(small_config)
        )
        kinds = [first[1], first[2], other[1], other[2]]
        assert len({float(entry.queries.projection[0, 0]) for entry in kinds}) == 4

    def test_queries_and_keys_have_their_own(self, small_config):
        reducer = make_reducer("act", q_hashes=5, k_hashes=5, group_keys=True)
        entry = reducer.resolve(small_config).draws(small_config)[0]
        assert not np.array_equal(entry.queries.projection, entry.keys.projection)

    def test_given_draws_replace_them(self, small_config, parameters, images):
        model = make(small_config, parameters, q_hashes=5)
        other = (
            make_reducer("act", q_hashes=5, hash_seed=7).resolve(small_config).draws(small_config)
        )
        forward = hvit_jax.jit_model(model)
        seeded = hvit_jax.jit_model(make(small_config, parameters, q_hashes=5, hash_seed=7))
        np.testing.assert_allclose(forward(images, other), seeded(images), atol=1e-5)
        assert np.abs(forward(images) - forward(images, other)).max() > 1e-3
