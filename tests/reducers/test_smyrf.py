"""SMYRF as a method of the model; its operations are tested in test_clustered_attention."""

import functools

import jax
import numpy as np
import pytest

import hvit_jax
from hvit_jax.architectures import named_config
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.ops.attention import attend
from hvit_jax.ops.clustered_attention import straddling_attention
from hvit_jax.reducers import make_reducer
from tests.published_rows import published, row_config, row_name, token_counts
from tests.small_models import block_of, build, compute_features, sharp_parameters

TOKENS = 49
OPTIONS = {"first_block": 1, "rounds": 4, "q_cluster_size": 10, "k_cluster_size": 10}


make = functools.partial(build, method="smyrf")


@pytest.fixture(scope="module")
def parameters(small_config):
    return sharp_parameters(small_config, 2)


class TestTables:
    @pytest.mark.parametrize("row", published("smyrf"), ids=row_name)
    def test_gflops(self, row):
        gflops = count_flops(row_config(row), make_reducer("smyrf", **row["args"])) / 1e9
        assert gflops == pytest.approx(row["gflops"], abs=0.005)
        assert gflops == pytest.approx(row["published"]["gflops"], abs=0.06)

    @pytest.mark.parametrize("row", published("smyrf"), ids=row_name)
    def test_full_size_models_trace(self, row):
        config = row_config(row)
        reducer = make_reducer("smyrf", **row["args"])
        assert token_counts(config, reducer) == [config.num_patches + 1] * config.depth

    @pytest.mark.parametrize(("model", "first"), [("vit_b16", 6), ("vit_l16", 12), ("vit_h14", 16)])
    def test_defaults_are_the_tables(self, model, first):
        config = named_config(model)
        resolved = make_reducer("smyrf").resolve(config)
        assert (resolved.first_block, resolved.last_block) == (first, config.depth - 1)
        assert (resolved.rounds, resolved.q_cluster_size, resolved.k_cluster_size) == (32, 32, 32)
        modes = [layer.mode for layer in resolved.schedule(config)]
        assert modes == ["dense"] * first + ["smyrf"] * (config.depth - first)


class TestModel:
    def test_one_cluster_is_dense(self, small_config, parameters, images):
        options = {**OPTIONS, "q_cluster_size": TOKENS, "k_cluster_size": TOKENS}
        whole = hvit_jax.jit_model(make(small_config, parameters, **options))(images)
        dense = hvit_jax.jit_model(make(small_config, parameters, method="dense"))(images)
        np.testing.assert_allclose(whole, dense, atol=2e-5)

    def test_only_blocks_in_the_range_cluster(self, small_config, parameters, images):
        options = {**OPTIONS, "first_block": 2, "last_block": 2, "unroll": True}
        ours = compute_features(make(small_config, parameters, **options), images)
        dense = make(small_config, parameters, method="dense", unroll=True)
        reference = compute_features(dense, images)
        for block in (0, 1):
            np.testing.assert_allclose(ours.tokens[block], reference.tokens[block], atol=1e-5)
        assert np.abs(ours.tokens[2] - reference.tokens[2]).max() > 1e-3
        again = block_of(dense, 3)(ours.tokens[2])
        np.testing.assert_allclose(ours.tokens[3], again, atol=1e-5)

    def test_more_rounds_come_closer_to_full_attention(self, small_config, parameters, images):
        dense = hvit_jax.jit_model(make(small_config, parameters, method="dense"))(images)
        errors = [
            np.abs(
                hvit_jax.jit_model(make(small_config, parameters, **{**OPTIONS, "rounds": rounds}))(
                    images
                )
                - dense
            ).mean()
            for rounds in (1, 48)
        ]
        assert errors[1] < errors[0] / 2


class TestStraddling:
    """49 tokens, 2 heads, 3 images and 4 rounds make lists of 1176 = 49 * 24 tokens."""

    def test_uses_the_original_clusters(self, small_config, parameters, images):
        options = {"first_block": 3, "rounds": 4, "q_cluster_size": 8, "k_cluster_size": 8}
        model = make(small_config, parameters, unroll=True, straddle=True, **options)
        seen = compute_features(model, images)
        block, draws = block_of(model, 3), model.reducer.draws(small_config)[3]
        x = seen.tokens[2]
        q, k, v = (each.array for each in block.qkv(x))
        attended = straddling_attention(q, k, v, draws, cluster_size=8)
        assert np.abs(attended - attend(q, k, v)).max() > 1e-3
        x = x + block.project(attended)
        np.testing.assert_allclose(seen.tokens[3], x + block.mlp(x), atol=1e-5)

    def test_a_batch_that_does_not_divide(self, small_config, parameters, images):
        options = {"rounds": 4, "q_cluster_size": 16, "k_cluster_size": 16, "straddle": True}
        forward = hvit_jax.jit_model(make(small_config, parameters, **options))
        assert np.isfinite(forward(images[:2])).all()
        with pytest.raises(InputError, match="16 do not divide 4 rounds x 3 images x 2 heads x 49"):
            forward(images)


class TestDraws:
    def test_fixed_by_the_seed_and_different_in_every_block(self, small_config):
        reducer = make_reducer("smyrf", rounds=5, first_block=2)
        first, again = (reducer.resolve(small_config).draws(small_config) for _ in range(2))
        assert [entry is None for entry in first] == [True, True, False, False]
        assert first[2].alpha.shape == (18, 5) and first[2].beta.shape == (5,)
        jax.tree.map(np.testing.assert_array_equal, first, again)
        other = make_reducer("smyrf", rounds=5, hash_seed=1).resolve(small_config)
        kinds = [first[2], first[3], *other.draws(small_config)[2:]]
        assert len({float(entry.alpha[0, 0]) for entry in kinds}) == 4

    def test_given_draws_replace_them(self, small_config, parameters, images):
        forward = hvit_jax.jit_model(make(small_config, parameters, **OPTIONS))
        model = make(small_config, parameters, hash_seed=7, **OPTIONS)
        other = model.reducer.draws(small_config)
        replaced = forward(images, other)
        np.testing.assert_allclose(replaced, hvit_jax.jit_model(model)(images), atol=2e-5)
        assert np.abs(forward(images) - replaced).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0: from 1 to 1024"),
        ({"q_cluster_size": 0}, "q_cluster_size=0: from 1 to the model's 49 tokens"),
        ({"q_cluster_size": 50}, "q_cluster_size=50: from 1 to the model's 49 tokens"),
        ({"k_cluster_size": 64}, "k_cluster_size=64: from 1 to the model's 49 tokens"),
        (
            {"q_cluster_size": 16, "k_cluster_size": 32},
            "k_cluster_size=32: cuts 49 keys into 2 clusters, where q_cluster_size=16 makes 4",
        ),
        (
            {"q_cluster_size": 25, "k_cluster_size": 26, "straddle": True},
            "k_cluster_size=26: straddle needs it to equal q_cluster_size=25",
        ),
        ({"first_block": 4}, "first_block=4: the model's blocks are 0 to 3"),
        ({"first_block": 2, "last_block": 1}, "last_block=1: from first_block=2 to 3"),
        ({"last_block": 4}, "last_block=4: from first_block=2 to 3"),
        ({"hash_seed": 2**32}, "hash_seed=4294967296: from 0 to 4294967295"),
    ],
)
def test_bad_options(small_config, options, message):
    with pytest.raises(InputError, match=message):
        hvit_jax.create(small_config, "smyrf", **options)
