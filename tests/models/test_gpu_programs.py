"""What is handed to XLA for a GPU: every method at full size, lowered for CUDA, never run.

JAX checks shapes and types of cuDNN's attention here; the kernel itself needs a GPU.
"""

import dataclasses
import functools
import importlib
import importlib.util
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hvit_jax.architectures import MODELS, model_name
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.costs import at_cost
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.models.vit import ViT
from hvit_jax.ops.attention import attend, cudnn, hopper
from hvit_jax.ops.platform import compiled_for
from hvit_jax.profiling.cases import published_cases
from hvit_jax.reducers import REDUCERS, make_reducer

BATCH = 32


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    """Let JAX and this package take a GPU with cuDNN for granted."""
    fused = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{fused}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{fused}.check_compute_capability", lambda wanted: True)
    monkeypatch.setattr(cudnn, "obstacle", lambda dtype, size: None)


def lowered(function, *arguments):
    """Write a function as the program that a GPU would get."""
    with compiled_for("gpu"):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def largest(program):
    """Count the numbers in the largest array of floats of a program.

    Ranks compare N x N integers in a sum, which is fused with it.
    """
    shapes = re.findall(r"tensor<((?:\d+x)+)b?f\d", program)
    return max(math.prod(map(int, shape.split("x")[:-1])) for shape in shapes)


@pytest.mark.parametrize("model", ["vit_l16", pytest.param("vit_h14", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", REDUCERS)
def test_full_size(method, model):
    """cuDNN attends, only permutations scatter, no N x N scores of all heads and images exist."""
    for config, reducer in settings_of(method, model):
        graph, state = nnx.split(nnx.eval_shape(functools.partial(make_model, config, reducer)))
        images = jax.ShapeDtypeStruct((BATCH, *config.image_shape, 3), jnp.float32)
        program = lowered(lambda state, images, g=graph: nnx.merge(g, state)(images), state, images)
        assert "__cudnn$fmha" in program
        assert "xf64>" not in program
        scatters = re.findall(r"stablehlo.scatter.*", program)
        assert all("unique_indices = true" in scatter for scatter in scatters)
        scores = BATCH * config.heads * (config.num_patches + 1) ** 2
        assert largest(program) <= scores / 4


def settings_of(method, model):
    """The first and the last published row, or a setting of one without such, on four blocks."""
    rows = published_cases(method, batch=BATCH)
    found = [(row.config, row.reducer) for row in rows if model_name(row.config) == model]
    short = dataclasses.replace(MODELS[model], depth=4)
    return (*found[:1], *found[-1:]) or [(short, at_cost(method, short, 0.5))]


def make_model(config, reducer):
    return ViT(config, reducer, rngs=nnx.Rngs(0), compute=Compute("bfloat16"))


@pytest.mark.parametrize("method", ["dense", "tome", "ats", "act"])
def test_our_kernel_at_full_size(method, monkeypatch):
    """It attends wherever cuDNN would, with a bias of sizes too; lengths are left to cuDNN."""
    monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: None)
    config, reducer = settings_of(method, "vit_l16")[0]
    graph, state = nnx.split(nnx.eval_shape(functools.partial(make_model, config, reducer)))
    images = jax.ShapeDtypeStruct((BATCH, *config.image_shape, 3), jnp.float32)
    program = lowered(lambda state, images: nnx.merge(graph, state)(images), state, images)
    assert "mosaic_gpu" in program and ("__cudnn$fmha" in program) == (method == "ats")


def test_our_kernel_where_numbers_have_64_bits(monkeypatch):
    """JAX_ENABLE_X64 is for the rest of a program; the kernel counts its blocks in 32 bits."""
    monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: None)
    heads = jax.ShapeDtypeStruct((2, 700, 2, 16), jnp.bfloat16)
    with jax.enable_x64(True):
        assert "mosaic_gpu" in lowered(lambda x: attend(x, x, x), heads)


@pytest.mark.parametrize(("method", "batch"), [("dense", 1), ("evit", 8), ("tome", 8), ("act", 8)])
def test_a_gradient_where_our_kernel_attends(method, batch, monkeypatch):
    """cuDNN has the backward pass: of joined heads, of scores, and with a bias."""
    monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: None)
    config = ViTConfig(72, patch_size=8, depth=2, width=32, heads=2, mlp_width=64, num_classes=5)
    options = {"evit": {"drop_locations": (0,)}, "tome": {"r": 8}}.get(method, {})
    make = functools.partial(make_model, config, make_reducer(method, **options))
    graph, state = nnx.split(nnx.eval_shape(make))
    images = jax.ShapeDtypeStruct((batch, *config.image_shape, 3), jnp.float32)

    def loss(state, images):
        return jnp.square(nnx.merge(graph, state)(images)).sum()

    assert "__cudnn$fmhaSoftmaxBackward" in lowered(jax.grad(loss), state, images)


@pytest.mark.slow_for("pitome", "tofu", "atc", "random", "pool")
@pytest.mark.parametrize("method", REDUCERS)
def test_an_image_does_not_depend_on_its_batch(method, plain_cudnn, monkeypatch):
    """As a GPU lays it out: neither on places, nor on a neighbour that is not finite."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: "it cannot run on a CPU")
    config = ViTConfig(48, patch_size=8, depth=3, width=32, heads=2, mlp_width=64, num_classes=5)
    compute = Compute(attention="cudnn")
    model = build_model(config, make_reducer(method), init_parameters(config, 0), compute)
    run, images = jax.jit(model), jax.random.normal(jax.random.key(1), (3, 48, 48, 3))
    first, turned = run(images), run(images[::-1].at[1].set(jnp.nan))
    np.testing.assert_allclose(first[0], turned[2], atol=1e-5)
    np.testing.assert_allclose(first[2], turned[0], atol=1e-5)
    assert jnp.isnan(turned[1]).all() and jnp.isfinite(first).all() and plain_cudnn


CUDA = [
    name for name in ("jax_cuda12_plugin", "jax_cuda13_plugin") if importlib.util.find_spec(name)
]


@pytest.fixture
def roofline(monkeypatch):
    """What compiles for an H200."""
    if not CUDA:
        pytest.skip("compiling for a GPU needs jax[cuda12] or jax[cuda13]")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("roofline")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
@pytest.mark.parametrize(
    ("method", "options"), [("tome", {"r": 8}), ("evo", {"prune_location": 1})]
)
def test_nothing_copies_what_one_product_gives(method, options, dtype, roofline):
    """Attention reads q, k and v where they lie, and so does what a method asks of them."""
    config = dataclasses.replace(ViTConfig.vit_l16(), depth=2)
    row = roofline.Row(method, config, make_reducer(method, **options), BATCH, Compute(dtype))
    listed = roofline.kernels(roofline.compile_for_h200(row).as_text())
    heads = [kernel for kernel in listed if re.match(r"\w+\[32, \d\d+, 16, 64\]", kernel.result)]
    assert len(heads) == 2 and all(kernel.kind == "attention" for kernel in heads)
    assert sum(kernel.result.endswith(", 3072]") for kernel in listed) == 2


def test_tome_merges_in_few_kernels(roofline):
    """One sort a block tells where tokens go, one kernel merges them; a plain block has 7."""
    config = dataclasses.replace(ViTConfig.vit_l16(), depth=2)
    row = roofline.Row("tome", config, make_reducer("tome", r=8), BATCH, Compute("bfloat16"))
    program = roofline.compile_for_h200(row).as_text()
    sorts = re.findall(r"= (\S+) sort\(", program)
    assert len(sorts) == 2 and all(kind.startswith("s64[") for kind in sorts)
    assert " scatter(" not in program
    listed = roofline.kernels(program)
    # A block has 14, in JAX 0.10 15; the rest are the embedding's, the head's and the first sizes.
    assert sum(kernel.times for kernel in listed) <= 2 * 15 + 7
    # Cosines of 64 channels are products of three times as many numbers of bfloat16.
    assert any(re.match(r"bf16\[[12], 32, 512, (192|3, 64)\]", kernel.result) for kernel in listed)


def test_smyrf_sorts_one_array_and_counts_in_one_kernel(roofline):
    """A sort carries places in numbers of 32 bits; clusters need no ranks, which were scattered.

    Attention reads q, k and v where one product puts them.
    """
    config = dataclasses.replace(ViTConfig.vit_l16(), depth=1)
    reducer = make_reducer("smyrf", first_block=0, rounds=8)
    row = roofline.Row("smyrf", config, reducer, BATCH, Compute("bfloat16"))
    program = roofline.compile_for_h200(row).as_text()
    sorts = re.findall(r"= (\S+) sort\(", program)
    assert len(sorts) == 2 and all(kind.startswith("u32[") for kind in sorts)
    assert " scatter(" not in program
    listed = roofline.kernels(program)
    assert program.count(" popcnt(") == 1
    counting = [kernel for kernel in listed if kernel.result == "bf16[32, 16, 1032, 1088]"]
    assert len(counting) == 1 and counting[0].source == "convert_element_type"
    heads = [kernel for kernel in listed if kernel.result.startswith("bf16[32, 1025, 16, 64]")]
    assert [kernel.kind for kernel in heads] == ["attention"]
    assert sum(kernel.result.endswith(", 3072]") for kernel in listed) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_products_take_on_bias_gelu_and_residual_sum(dtype, roofline):
    """In the program that an H200 would run; elsewhere each is a pass over the tokens."""
    config = dataclasses.replace(ViTConfig.vit_l16(), depth=3)
    row = roofline.Row("dense", config, make_reducer("dense"), BATCH, Compute(dtype))
    program = roofline.compile_for_h200(row).as_text()
    body = [line for line in program.splitlines() if "while/body" in line and "__cublas" in line]
    products = [line for line in body if "custom-call(" in line]
    # q, k and v in one, which our attention reads where they are; the projection; the MLP's two.
    assert len(products) == 4
    eights = [line for line in products if "__cublas$lt$matmul$f8" in line]
    assert len(eights) == (4 if dtype == "float8" else 0)
    # What GELU gives is rounded inside the product; in bfloat16 it is as wide as the rest.
    assert sum("(f8e4m3fn[32800,4096]" in line for line in products) == len(eights) / 4
    # LayerNorms round their results themselves, and so does attention, around which JAX 0.11 puts
    # the cut of its factor from the stack.
    found = r"f8e4m3fn\[32(?:800)?,\S+ fusion\(.*kind=(\w+), calls=%(?!dynamic-slice-fusion)"
    rounding = re.findall(found, program)
    assert sorted(rounding) == (["kCustom", "kCustom"] if eights else [])
    assert sum('"epilogue":"BIAS"' in line for line in products) == 3
    assert sum('"epilogue":"BIAS_GELU"' in line for line in products) == 1
    assert sum('"beta":1' in line for line in products) == 2


def gradient_of_attend(q, k, v, bias, lengths):
    def loss(q, k, v, bias):
        out = attend(q, k, v, key_bias=bias, key_lengths=lengths)
        return jnp.square(out.astype(jnp.float32)).sum()

    return jax.grad(loss, argnums=(0, 1, 2) if bias is None else (0, 1, 2, 3))(q, k, v, bias)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("bias", [None, (BATCH,), (BATCH, 16)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [1370, 1025])
def test_gradient_of_attention(dtype, head_dim, bias, padded, tokens):
    """JAX takes only even numbers of tokens where it differentiates; ViT-L/16 has 1,025."""
    heads = jax.ShapeDtypeStruct((BATCH, tokens, 16, head_dim), dtype)
    bias = bias and jax.ShapeDtypeStruct((*bias, tokens), jnp.float32)
    lengths = jax.ShapeDtypeStruct((BATCH,), jnp.int32) if padded else None
    program = lowered(gradient_of_attend, heads, heads, heads, bias, lengths)
    assert "__cudnn$fmhaSoftmaxBackward" in program
    assert largest(program) <= 2 * BATCH * 1370 * 16 * head_dim
