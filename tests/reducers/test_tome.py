"""ToMe in a model."""

import dataclasses
import json
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax.architectures import named_config
from hvit_jax.config import Compute
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.models.vit import segments
from hvit_jax.reducers import Reducer, ToMe
from tests.reducers.merges import holdings
from tests.small_models import compute_features

TABLE = json.loads((resources.files("hvit_jax") / "published.json").read_text())["rows"]
ROWS = [row for row in TABLE if row["method"] == "tome"]


MERGES = (10, 0, 3, 7)


@pytest.fixture(scope="module")
def images(small_config):
    """Three pictures of 6 x 8 patches."""
    return jax.random.normal(jax.random.key(1), (3, *small_config.image_shape, 3))


@pytest.fixture(scope="module")
def parameters(small_config):
    return init_parameters(small_config, seed=0)


@pytest.fixture(scope="module")
def dense(small_config, parameters, images):
    return run(build_model(small_config, Reducer(), parameters), images)


@pytest.fixture(scope="module")
def model(small_config, parameters):
    return build_model(small_config, ToMe(r=MERGES), parameters)


@pytest.fixture(scope="module")
def features(model, images):
    return compute_features(model, images)


def run(model, images):
    return hvit_jax.jit_model(model)(images)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}_r{row['args']['r']}")
def test_published_row(row):
    config, reducer = named_config(row["model"]), ToMe(**row["args"])
    assert count_flops(config, reducer) / 1e9 == pytest.approx(row["gflops"], abs=0.005)
    r, full = row["args"]["r"], config.num_patches + 1
    expected = [full - r * (block + 1) for block in range(config.depth)]
    assert [layer.tokens_out for layer in reducer.schedule(config)] == expected


def test_default_r(small_config):
    resolved = [ToMe().resolve(named_config(name)).r for name in ("vit_l16", "vit_h14", "vit_b16")]
    assert resolved == [20, 20, 23]
    tiny = dataclasses.replace(small_config, resolution=16, depth=9)
    layers = ToMe().resolve(tiny).schedule(tiny)
    assert [layer.tokens_out for layer in layers] == [4, 3, 2, 2, 2, 2, 2, 2, 2]


def test_flops_by_hand():
    # 4 patches of 1 x 1, one head of 2 channels: 5 tokens, then 4, 4, 3.
    config = hvit_jax.ViTConfig(2, 1, depth=3, width=2, heads=1, mlp_width=3)
    assert [layer.tokens_out for layer in ToMe(r=(1, 0, 1)).schedule(config)] == [4, 4, 3]
    attention = {n: 8 * n + 18 * n + 2 * n + 4 * n * n + 5 * n * n + 6 * n + 4 * n for n in (4, 5)}
    mlp = {n: 8 * n + 9 * n + 8 * n + 6 * n + 4 * n for n in (3, 4)}
    merge = {5: 10 + 3 * 2 * 2 + 10 + 8, 4: 8 + 2 * 2 * 2 + 8 + 6}
    sizes = 16  # 4 x 4, in the blocks after the first merge
    blocks = attention[5] + merge[5] + mlp[4]
    blocks += attention[4] + sizes + mlp[4]
    blocks += attention[4] + sizes + merge[4] + mlp[3]
    around = 4 * 2 * 3 + 10 + 4 * 3 * 2 + 3 * 1000 + 10
    assert count_flops(config, ToMe(r=(1, 0, 1))) == blocks + around
    unweighted = ToMe(r=(1, 0, 1), proportional_attention=False)
    assert count_flops(config, unweighted) == blocks + around - 2 * sizes
    # Mean 1 and inflection -1.0: 2, 1 and 0 tokens.
    falling, listed = ToMe(r=(1, -1.0)), ToMe(r=(2, 1))
    assert count_flops(config, falling) == count_flops(config, listed)
    assert [layer.tokens_out for layer in falling.schedule(config)] == [3, 2, 2]


def test_blocks_that_merge_nothing_share_a_segment(small_config):
    config = dataclasses.replace(small_config, depth=8)
    runs = segments(ToMe(r=(0, 0, 5, 0, 0, 0, 2)).schedule(config))
    assert [count for _, count in runs] == [2, 1, 3, 1, 1]


def test_r_0_is_dense(small_config, parameters, images, dense):
    model = build_model(small_config, ToMe(r=0), parameters)
    np.testing.assert_allclose(run(model, images), dense, atol=1e-6)


def test_merging_equal_tokens_changes_nothing_in_proportion(small_config, parameters):
    """With all patches alike, size-weighted attention sees what the dense model sees."""
    parameters = {**parameters, "class_token": jnp.ones(small_config.width)}
    parameters["pos_embedding"] = jnp.zeros_like(parameters["pos_embedding"])
    images = jnp.broadcast_to(jnp.asarray([0.3, -0.2, 0.9]), (1, *small_config.image_shape, 3))
    methods = (Reducer(), ToMe(r=(10,)), ToMe(r=(10,), proportional_attention=False))
    dense, weighted, unweighted = (
        run(build_model(small_config, method, parameters), images) for method in methods
    )
    np.testing.assert_allclose(weighted, dense, atol=1e-5)
    assert np.abs(unweighted - dense).max() > 1e-4


def test_token_counts_follow_the_schedule(model, features):
    counts = [layer.tokens_out for layer in model.reducer.schedule(model.config)]
    assert counts == [39, 39, 36, 29]
    assert [x.shape[1] for x in features.tokens] == counts


def test_trace_accounts_for_every_token(features):
    for tokens, state in zip(features.tokens, features.states, strict=True):
        held = holdings(np.pad(state.source, ((0, 0), (1, 0))))  # CLS stays token 0.
        assert held.shape[1] == tokens.shape[1]
        np.testing.assert_array_equal(held.sum(1), 1)
        np.testing.assert_array_equal(held.sum(2), state.sizes)
        np.testing.assert_array_equal(state.sizes[:, 0], 1)
        assert (state.source > 0).all()


def test_restore_gives_each_patch_its_token(model, features):
    tokens, state = features.tokens[-1], features.states[-1]
    restored = model.reducer.restore(tokens, state)
    assert restored.shape == (3, 48, 32)
    for image in range(3):
        np.testing.assert_array_equal(restored[image], tokens[image][state.source[image]])


def test_bfloat16_is_close_to_float32(small_config, parameters, images, features):
    model = build_model(small_config, ToMe(r=MERGES), parameters, Compute("bfloat16"))
    half = compute_features(model, images)
    assert half.tokens[-1].dtype == jnp.bfloat16
    assert half.states[-1].sizes.dtype == jnp.float32
    np.testing.assert_array_equal(half.states[-1].sizes.sum(1), 49)
    np.testing.assert_allclose(half.output, features.output, atol=0.05)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "tome: r=-1: .* at least 0"),
        ((1, 2, 3, 4, 5), "lists 5 numbers, the model has 4 blocks"),
        ((8, -1.5), r"r=\(8, -1.5\): the inflection must be between -1 and 1"),
        (2.5, "r must be a whole number or .*, got 2.5"),
        ("8", "r must be a whole number or .*, got '8'"),
        (float("nan"), "got nan"),
        (True, "got True"),
        ((8.5, 0.5), r"\(a whole number, a number\), got \(8.5, 0.5\)"),
    ],
)
def test_bad_r(small_config, r, message):
    with pytest.raises(InputError, match=message):
        hvit_jax.create(small_config, "tome", r=r)


def test_options_survive_json(small_config):
    for r in (8, (8, 3), (8, 1.0), [4, 3, 2]):
        reducer = ToMe(r=r).resolve(small_config)
        stored = json.loads(json.dumps(reducer.options()))
        assert ToMe(**stored).schedule(small_config) == reducer.schedule(small_config)
