"""Linear layers in float8: rounded as NumPy rounds them, by limits that no token exceeds."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import hvit_jax
from hvit_jax import Compute
from hvit_jax.config import Decoder
from hvit_jax.models.parameters import abstract_parameters, build_model
from hvit_jax.models.reducer import Reducer
from tests.small_models import KINDS, SMALL, build, loud_parameters, noise

LAYERS = ("in_proj", "out_proj", "linear_1", "linear_2")
# One factor for what GELU gives; gated, and without CLS; normalised hidden channels.
TELLING = ("swag", "dinov3", "perception")


def block_of(model, index=1):
    """One of a model's stacked blocks."""
    graph, weights = nnx.split(model.segments[0])
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], weights))


@pytest.fixture(scope="module", params=TELLING)
def blocks(request):
    """A kind of block in float32, the same in float8, and its parameters."""
    config = dataclasses.replace(KINDS[request.param], depth=2)
    parameters = loud_parameters(config)
    made = (
        build(config, parameters, method="dense", dtype=dtype) for dtype in ("float32", "float8")
    )
    return *map(block_of, made), jax.tree.map(lambda leaf: leaf[1], parameters["blocks"])


def test_layers_against_numpy(blocks):
    _, block, parameters = blocks
    for name in LAYERS:
        layer, given = getattr(block, name), parameters[name]
        factor, scale = (np.asarray(each[...], np.float64) for each in (layer.factor, layer.scale))
        assert np.all(np.log2(factor) % 1 == 0) and np.log2(scale) % 1 == 0
        exact = (given["kernel"] / np.reshape(factor, (-1, 1))).T / scale
        kernel = exact.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        np.testing.assert_array_equal(np.asarray(layer.kernel[...], np.float64), kernel)
        assert 224 <= np.abs(kernel).max() <= 448

        x = np.random.default_rng(1).normal(size=(2, 5, len(given["kernel"]))) / factor * 100
        x = x.astype(ml_dtypes.bfloat16)
        rounded = np.clip(x.astype(np.float64) * factor, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        expected = rounded.astype(np.float64) @ kernel.T * scale + given.get("bias", 0)
        found = layer(jnp.asarray(x))
        assert found.dtype == jnp.bfloat16
        # Twice rounded to bfloat16, before the bias and after.
        slack = 2**-7 * np.abs(expected).max()
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=slack)


def test_a_norm_that_multiplies_by_the_factor_is_equal(blocks):
    _, block, _ = blocks
    x = jax.random.normal(jax.random.key(0), (7, block.in_proj.kernel.shape[1]), jnp.bfloat16)
    for norm, layer in ((block.ln_1, block.in_proj), (block.ln_2, block.linear_1)):
        both = layer.round_normed(norm, x), layer.round(norm(x))
        np.testing.assert_array_equal(*(np.asarray(each, np.float32) for each in both))


def test_no_token_exceeds_the_limits(blocks):
    """Not even one of a single channel, whose LayerNorm is as long as can be."""
    exact, block, _ = blocks
    width = block.in_proj.kernel.shape[1]
    singles = jnp.eye(width)
    x = jnp.stack([100 * singles, -singles, jax.random.normal(jax.random.key(0), (width, width))])
    seen = {"in_proj": exact.ln_1(x), "linear_1": exact.ln_2(x)}
    seen["out_proj"] = exact.qkv(x)[2].array.reshape(x.shape)
    exact.linear_2 = lambda hidden: seen.setdefault("linear_2", hidden)[..., :width]
    exact.run_mlp(seen["linear_1"])
    largest = {
        name: float(jnp.abs(inputs * getattr(block, name).factor[...].astype(jnp.float32)).max())
        for name, inputs in seen.items()
    }
    assert set(largest) == set(LAYERS) and max(largest.values()) <= 448
    # Nor are they wider than powers of two make them, where LayerNorm is all that counts.
    assert min(largest["in_proj"], largest["linear_1"]) > 448 / 4


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("swag", "tome", {"r": 4}),
        ("dinov3", "hourglass", {"cluster_location": 1, "num_clusters": (3, 4)}),
    ],
)
def test_outputs_are_close_to_those_in_bfloat16(kind, method, options):
    """Every method is traced in test_contract.py; e4m3 has four bits fewer than bfloat16."""
    config, outputs = dataclasses.replace(KINDS[kind], depth=2), {}
    for dtype in ("bfloat16", "float8"):
        model = hvit_jax.create(config, method, dtype=dtype, **options)
        outputs[dtype] = np.asarray(hvit_jax.jit_model(model)(noise(config)))
    off = outputs["float8"] - outputs["bfloat16"]
    assert 0.01 < np.sqrt(np.square(off).mean()) / outputs["bfloat16"].std() < 0.3


def test_a_decoders_blocks_are_in_float8_too():
    decoder = Decoder("mask", 3, depth=2, heads=2)
    config = dataclasses.replace(SMALL, num_classes=0, decoder=decoder)
    model = jax.eval_shape(
        lambda parameters: nnx.state(build_model(config, Reducer(), parameters, Compute("float8"))),
        abstract_parameters(config),
    )
    for blocks in (model["segments"][0], model["decoder"]["blocks"]):
        for name in LAYERS:
            assert blocks[name]["kernel"].dtype == jnp.float8_e4m3fn
            assert blocks[name]["bias"].dtype == jnp.bfloat16
    assert model["decoder"]["proj"]["kernel"].dtype == jnp.float32
