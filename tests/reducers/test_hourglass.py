import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.ops import flops
from hvit_jax.ops.clustering import closeness, cluster_tokens, pool_tokens, reconstruct_tokens
from hvit_jax.ops.platform import compiled_for
from hvit_jax.reducers import Hourglass
from tests.small_models import compute_features

CLUSTERED = {"cluster_location": 1, "num_clusters": (3, 4)}
BACK = {**CLUSTERED, "reconstruct_location": 2}


@pytest.fixture(scope="module")
def images(small_config):
    shape = (2, *small_config.image_shape, 3)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        (
            {
                "reconstruct_neighbors": -1,
                "reconstruct_temperature": 2.0,
                "reconstruct_normalize": "sum",
            },
            {"k": -1, "temperature": 2.0, "normalize": "sum"},
        ),
    ],
)
def test_reconstructs_inside_the_model(small_config, images, options, arguments):
    """Compare with clustering alone, reconstruction by hand, and the last block on all patches."""
    clustered = hvit_jax.create(small_config, "hourglass", seed=1, **CLUSTERED)
    features = compute_features(clustered, images)
    before = features.tokens[0][:, 1:]
    centroids = features.states[2].centroids
    tokens = features.tokens[2]
    grid = reconstruct_tokens(before, centroids, tokens[:, 1:], **arguments)
    expected = clustered.block_at(3)[0](jnp.concatenate([tokens[:, :1], grid], axis=1))
    model = hvit_jax.create(small_config, "hourglass", seed=1, **BACK, **options)
    found = compute_features(model, images)
    np.testing.assert_allclose(found.tokens[2][:, 1:], grid, atol=1e-5)
    np.testing.assert_allclose(found.tokens[3], expected, atol=1e-5)
    np.testing.assert_allclose(hvit_jax.jit_model(model)(images), found.output, atol=1e-5)


SIZES = {"grid": (6, 8), "clusters": (3, 4)}


def distances(x, centroids):
    return np.square(np.asarray(x)[:, None] - np.asarray(centroids)[None]).sum(-1)


def test_automatic_temperatures_are_those_of_each_pictures_distances():
    """One picture at a time, its distances taken by hand; every window holds all 12 centroids."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 48, 5)), jnp.float32)
    x = x * jnp.array([1.0, 30.0])[:, None, None]
    options = {**SIZES, "window": 7}
    found, _ = cluster_tokens(x, **options, temperature="auto")
    spread = reconstruct_tokens(x, found, found, temperature="auto")
    for row in (0, 1):
        only = x[row : row + 1]
        first = distances(x[row], pool_tokens(only, **SIZES)[0]).min(1).mean()
        expected, _ = cluster_tokens(only, **options, temperature=float(8 / first))
        np.testing.assert_allclose(found[row], expected[0], rtol=1e-4, atol=1e-4)
        last = distances(x[row], found[row]).min(1).mean()
        wanted = reconstruct_tokens(
            only, found[row][None], found[row][None], temperature=float(1 / last)
        )
        np.testing.assert_allclose(spread[row], wanted[0], rtol=1e-4, atol=1e-4)


def test_automatic_temperatures_do_not_know_a_models_scale():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 48, 5)), jnp.float32)
    small, large = (
        cluster_tokens(scale * x, **SIZES, temperature="auto")[0] / scale for scale in (0.01, 100.0)
    )
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)
    level = jnp.ones_like(x).at[:, :, 0].set(1000.0)
    flat, _ = cluster_tokens(level, **SIZES, temperature="auto")
    np.testing.assert_allclose(flat, level[:, :12], rtol=1e-5)
    back = reconstruct_tokens(level, flat, flat, temperature="auto", normalize="sum")
    np.testing.assert_allclose(back, level, rtol=1e-5)
    np.testing.assert_array_equal(cluster_tokens(0 * x, **SIZES, temperature="auto")[0], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_distances_are_those_to_centroids_as_they_are_multiplied(dtype):
    """Rounded in the product alone, large centroids would be nearer or farther than they are."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(20 + rng.normal(size=(1, 9, 64)), dtype)
    centroids = jnp.asarray(20 + rng.normal(size=(1, 4, 64)), jnp.float32)
    found = jax.jit(closeness)(x, centroids)
    x, centroids = (np.asarray(each.astype(dtype), np.float64) for each in (x, centroids))
    squares = np.square(x).sum(-1)[..., None]
    expected = squares - np.square(x[:, :, None] - centroids[:, None]).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("temperature", [0.3, "auto"])
def test_a_gpus_rows_by_the_eight_change_nothing(temperature):
    """35 patches are filled up to 40, 6 centroids to 8; windows overlap where cells do."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 35, 4)), jnp.bfloat16)
    places = jnp.asarray(np.random.default_rng(4).normal(size=(1, 35, 2)), jnp.float32)
    options = {"grid": (5, 7), "clusters": (2, 3), "window": 3, "temperature": temperature}
    expected = cluster_tokens(x, **options, places=places)
    with compiled_for("gpu"):
        found = cluster_tokens(x, **options, places=places)
        alone, _ = cluster_tokens(x, **options)
    # Sums in another order may be rounded to the next number of bfloat16.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-3, atol=2**-8)
    np.testing.assert_allclose(found[1], expected[1], rtol=2e-2, atol=1e-2)
    np.testing.assert_array_equal(alone, found[0])


def test_every_patch_is_its_own_token_again(small_config, images):
    model = hvit_jax.create(small_config, "hourglass", seed=1, **BACK)
    states = compute_features(model, images).states
    identity = np.arange(1, 49)
    assert (np.asarray(states[1].source) <= 12).all()
    np.testing.assert_array_equal(states[2].source, np.broadcast_to(identity, (2, 48)))
    assert states[3].before is None and states[3].centroids is None


def test_schedule(small_config):
    layers = Hourglass(**BACK).resolve(small_config).schedule(small_config)
    assert [(layer.tokens_in, layer.tokens_out) for layer in layers] == [
        (49, 49),
        (49, 13),
        (13, 49),
        (49, 49),
    ]


def test_counts_the_reconstruction(small_config):
    whole, part = (
        hvit_jax.count_flops(small_config, Hourglass(**CLUSTERED, **options))
        for options in ({"reconstruct_location": 3}, {})
    )
    # Distances as in an iteration of clustering; temperature, squares and division; the sum.
    distances = (48 + 12 + 48 * 12) * 32 + 3 * 48 * 12
    reconstruction = distances + 3 * 48 * 12 + 48 * 12 * 32
    final_norm = 4 * (49 - 13) * 32
    assert whole - part == reconstruction + final_norm


def test_blocks_behind_run_on_all_patches(small_config):
    early, late = (
        hvit_jax.count_flops(small_config, Hourglass(**CLUSTERED, reconstruct_location=location))
        for location in (2, 3)
    )
    dropout = (49 - 13) * 32
    blocks = flops.block(small_config, 49, 49) - flops.block(small_config, 13, 13)
    assert early - late == blocks + dropout


def test_reconstruction_refuses_what_it_cannot_do():
    x = jnp.ones((1, 4, 2))
    with pytest.raises(hvit_jax.InputError, match="must be 'l2' or 'sum', got 'l1'"):
        reconstruct_tokens(x, x, x, normalize="l1")
    with pytest.raises(hvit_jax.InputError, match="at least 1, or negative .*; got 0"):
        reconstruct_tokens(x, x, x, k=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reconstruct_location": 1}, "a block from 2, behind cluster_location, to 3"),
        ({"reconstruct_location": 4}, "to 3"),
        ({"cluster_location": 3, "reconstruct_location": 3}, "no block is left behind"),
        ({"reconstruct_neighbors": 0}, "at least 1, or negative for all"),
        ({"reconstruct_temperature": 0.0}, "above 0"),
        ({"cluster_temperature": "warm"}, "must be one of a number, auto: 'warm'"),
        ({"reconstruct_normalize": "max"}, "one of l2, sum"),
    ],
)
def test_refuses_impossible_options(small_config, options, message):
    with pytest.raises(InputError, match=message):
        hvit_jax.make_reducer("hourglass", **{**CLUSTERED, **options}).resolve(small_config)
