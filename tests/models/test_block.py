"""The parts of a transformer block that JAX does not have as we need them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.block import Block, LayerNorm
from hvit_jax.ops.activations import gelu, tanh_gelu
from hvit_jax.ops.attention import hopper
from hvit_jax.ops.platform import compiled_for
from tests.small_models import KINDS


def test_gelu_equals_that_of_jax():
    x = jnp.linspace(-9, 9, 1001)
    np.testing.assert_allclose(gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    slopes = (jax.vmap(jax.grad(f))(x) for f in (gelu, lambda y: jax.nn.gelu(y, approximate=False)))
    np.testing.assert_allclose(*slopes, atol=1e-6)


def test_gelu_rounds_once_in_bfloat16():
    x = jnp.linspace(-9, 9, 1001, dtype=jnp.bfloat16)
    exact = gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gelu(x), exact)


@pytest.mark.parametrize("batch", [3, 8])  # An odd number of rows; more than 40 of them.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gpus_program_computes_the_same(batch, dtype, small_config, plain_cudnn, monkeypatch):
    """There q, k and v are products of their own, and odd numbers of rows are filled up."""
    monkeypatch.setattr("hvit_jax.models.gpu._SEPARATE_ROWS", 40)
    compute = Compute(jnp.dtype(dtype).name, gelu="exact")
    block = Block(small_config, compute=compute, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (batch, 13, small_config.width), dtype)

    def run():
        return jax.jit(lambda x: (block(x), *(each.array for each in block.qkv(x))))(x)

    with compiled_for("gpu"):
        ours = run()
    assert ours[0].shape == x.shape and plain_cudnn == ["cudnn"]
    slack = {"rtol": 0.02, "atol": 0.05} if dtype == jnp.bfloat16 else {"atol": 2e-6}
    for got, expected in zip(ours, run(), strict=True):
        np.testing.assert_allclose(*(np.asarray(y, np.float64) for y in (got, expected)), **slack)


@pytest.mark.parametrize("kind", ["dinov3", "perception"])
def test_a_gpus_program_turns_the_same_tokens(kind, plain_cudnn):
    """Tokens that fill up the rows stand behind the patches, and so do their places."""
    config = KINDS[kind]
    block = Block(config, compute=Compute(gelu="exact"), rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (3, config.prefix_tokens + 6, config.width))
    places = jax.random.normal(keys[1], (1, 6, 2))

    def run():
        return jax.jit(lambda x, places: block(x, places))(x, places)

    with compiled_for("gpu"):
        ours = run()
    assert plain_cudnn == ["cudnn"]
    np.testing.assert_allclose(ours, run(), atol=3e-6)


def test_gelu_by_tanh_is_close():
    x = jnp.linspace(-9, 9, 10001)
    off = jnp.abs(tanh_gelu(x) - gelu(x))
    assert 4e-4 < off.max() < 4.8e-4


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "chosen"),
    [
        ("auto", "cpu", "bfloat16", "exact"),
        ("auto", "gpu", "bfloat16", "tanh"),
        ("auto", "gpu", "float32", "exact"),
        ("exact", "gpu", "bfloat16", "exact"),
        ("tanh", "cpu", "float32", "tanh"),
    ],
)
def test_which_gelu_runs(requested, device, dtype, chosen, small_config, plain_cudnn):
    block = Block(small_config, compute=Compute(dtype, gelu=requested), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 13, small_config.width), dtype)
    with compiled_for(device):
        program = str(jax.make_jaxpr(block.mlp)(x))
    assert (" tanh " in program, " erf " in program) == (chosen == "tanh", chosen == "exact")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_equals_flax_s(dtype):
    """To the last bit, gradients too; ours runs under strict promotion as well."""
    ours = LayerNorm(8, epsilon=1e-6, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    theirs = nnx.LayerNorm(8, epsilon=1e-6, dtype=dtype, use_fast_variance=False, rngs=nnx.Rngs(0))
    x, weights, scale, bias = jax.random.normal(jax.random.key(0), (4, 3, 5, 8))
    for norm in (ours, theirs):
        norm.scale[...], norm.bias[...] = 1 + scale[0, 0], bias[0, 0]

    def loss(norm, x):
        return (norm(x) * weights.astype(x.dtype)).sum()

    found, expected = (
        nnx.value_and_grad(loss, argnums=(0, 1))(norm, x.astype(dtype)) for norm in (ours, theirs)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("plain", "bfloat16"), ("plain", "float8"), ("dinov3", "bfloat16")]
)
def test_our_kernel_stands_between_two_products(kind, dtype, plain_cudnn, monkeypatch):
    """It reads what one gives, unless that is turned first, and writes what the other reads."""
    monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: None)
    config = KINDS.get(kind, ViTConfig(16, patch_size=8, depth=1, width=32, heads=2, mlp_width=64))
    block = Block(config, compute=Compute(dtype), rngs=nnx.Rngs(0))
    graph, state = nnx.split(block)
    tokens = config.prefix_tokens + 4

    def run(state, x, places):
        return nnx.merge(graph, state)(x, places)

    with compiled_for("gpu"):
        shapes = (16, tokens, config.width), (1, 4, 2)
        x, places = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(shapes, (jnp.bfloat16, jnp.float32), strict=True)
        )
        traced = jax.jit(run).trace(state, x, places)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("stablehlo.slice" in program) == (kind != "plain")
    assert program.count("stablehlo.dot_general") == 4
    kernel = re.search(r"@mosaic_gpu.* -> tensor<[0-9x]*(\w+)>", program)
    assert kernel[1] == {"bfloat16": "bf16", "float8": "f8E4M3FN"}[dtype]
