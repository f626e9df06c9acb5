"""Every way to compute attention, against float64 NumPy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import largest_divisor
from hvit_jax.ops.attention import (
    Heads,
    attend,
    attend_and_score,
    attention_weights,
    choose_implementation,
    class_attention,
    cudnn,
    hopper,
    hopper_blocks,
    hopper_kernel,
    xla,
)
from hvit_jax.ops.platform import compiled_for


def heads(queries, keys, *, batch=2, count=3, size=8, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [(batch, tokens, count, size) for tokens in (queries, keys, keys)]
    return tuple(jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes)


def reference(q, k, v, bias=None, lengths=None):
    """Weights (B, H, Nq, Nk) and output (B, Nq, H, D), in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        scores = scores + (bias[:, None] if bias.ndim == 2 else bias)[:, :, None]
    if lengths is not None:
        beyond = np.arange(k.shape[1]) >= np.asarray(lengths)[:, None]
        scores = np.where(beyond[:, None, None], -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights, np.einsum("bhnm,bmhd->bnhd", weights, v)


@pytest.fixture(params=["cpu", "gpu"])
def layout(request):
    """Run the program that XLA gets on either kind of device."""
    with compiled_for(request.param):
        yield


@pytest.fixture(params=["cpu", "gpu", "onnx"])
def layout_or_file(request):
    """Run that, or the program of ONNX files, which is in float32 and has no gradients."""
    with compiled_for(request.param):
        yield


# One head at a time, or all at once.
few_heads = pytest.mark.parametrize("at_once", [1, 2**20])


@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (13, 13), (4, 9)])
@pytest.mark.parametrize("extra", ["none", "bias", "lengths", "both", "by head", "by head, both"])
def test_attention_equals_numpy(queries, keys, extra, layout_or_file):
    q, k, v = heads(queries, keys)
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(2, 3, keys) if "by head" in extra else (2, keys))
    bias = None if extra in ("none", "lengths") else jnp.asarray(bias, jnp.float32)
    lengths = jnp.array([keys, 3]) if extra == "lengths" or "both" in extra else None
    out = attend(q, k, v, key_bias=bias, key_lengths=lengths, implementation="xla")
    np.testing.assert_allclose(out, reference(q, k, v, bias, lengths)[1], atol=2e-6)
    weights = attention_weights(q, k, key_bias=bias, key_lengths=lengths)
    np.testing.assert_allclose(weights, reference(q, k, v, bias, lengths)[0], atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_a_bias_of_log_counts_repeats_keys(implementation, layout_or_file, plain_cudnn):
    """Each head has its own counts; a key counted 0 times is as if it were not there."""
    q, k, v = heads(5, 5)
    counts = np.array([[3, 1, 2, 0, 0], [1, 1, 1, 1, 2], [0, 0, 5, 0, 0]])
    bias = jnp.stack([jnp.log(counts), jnp.log(counts[::-1])])
    out = attend(q, k, v, key_bias=bias, implementation=implementation)
    for image, head in np.ndindex(2, 3):
        one = slice(image, image + 1), slice(None), slice(head, head + 1)
        times = counts[head if image == 0 else 2 - head]
        expected = reference(q[one], *(np.repeat(x[one], times, axis=1) for x in (k, v)))[1]
        np.testing.assert_allclose(out[one], expected, atol=3e-6)


@few_heads
def test_column_mean_equals_numpy(at_once):
    q, k, v = heads(11, 14, size=5)
    out, columns = xla.attend_and_score(q, k, v, at_once=at_once)
    weights, expected = reference(q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(columns, weights.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(columns.sum(1), 1, atol=1e-6)


def test_large_scores_do_not_overflow(layout_or_file):
    q, k, v = heads(5, 5)
    out, columns = attend_and_score(100 * q, k, v, implementation="xla")
    weights, expected = reference(100 * q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-3)
    np.testing.assert_allclose(columns, weights.mean((1, 2)), atol=1e-3)


def test_bfloat16_computes_scores_in_float32(layout):
    q, k, v = heads(40, 40, size=16, dtype=jnp.bfloat16)
    out, columns = attend_and_score(q, k, v, implementation="xla")
    weights, expected = reference(q, k, v)
    assert out.dtype == jnp.bfloat16 and columns.dtype == jnp.float32
    np.testing.assert_allclose(columns, weights.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)
    plain = attend(q, k, v, implementation="xla")
    np.testing.assert_allclose(np.asarray(plain, np.float64), expected, atol=0.03)


def test_class_attention_is_the_first_row():
    q, k, v = heads(6, 6)
    np.testing.assert_allclose(
        class_attention(q, k, prefix=1), reference(q, k, v)[0].mean(1)[:, 0, 1:], atol=1e-6
    )


def test_gradients_equal_those_of_plain_softmax(layout):
    arrays = heads(9, 12)
    bias = jnp.linspace(-1, 1, 24).reshape(2, 12)
    lengths = jnp.array([12, 5])

    def plain(q, k, v, bias):
        weights = jax.nn.softmax(
            jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
            + jnp.where(jnp.arange(12) < lengths[:, None], bias, -1e30)[:, None, None],
        )
        return jnp.sin(jnp.einsum("bhnm,bmhd->bnhd", weights, v)).sum()

    def ours(q, k, v, bias):
        out = attend(q, k, v, key_bias=bias, key_lengths=lengths, implementation="xla")
        return jnp.sin(out).sum()

    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*arrays, bias)
    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(*arrays, bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


@few_heads
def test_gradients_of_column_mean(at_once):
    q, k, v = heads(9, 9)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 9)), jnp.float32)
    target = jnp.linspace(0, 1, 9)

    def plain(q, k, v, bias):
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(scores + bias[:, :, None])
        out = jnp.einsum("bhnm,bmhd->bnhd", weights, v)
        return jnp.sin(out).sum() + (weights.mean((1, 2)) * target).sum()

    def ours(q, k, v, bias):
        out, columns = xla.attend_and_score(q, k, v, bias, at_once=at_once)
        return jnp.sin(out).sum() + (columns * target).sum()

    got = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(q, k, v, bias)
    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(q, k, v, bias)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


def test_scores_of_all_heads_never_exist_together():
    q, k, v = heads(700, 700, batch=4, count=4)

    def loss(q, k, v):
        out, columns = attend_and_score(q, k, v, implementation="xla")
        return jnp.square(out).sum() + jnp.square(columns).sum()

    all_scores = 4 * 4 * 700 * 700 * 4
    for function in (loss, jax.grad(loss, argnums=(0, 1, 2))):
        compiled = jax.jit(function).lower(q, k, v).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 2


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_gets_the_key_bias_as_head_channels(by_head, dtype, plain_cudnn):
    q, k, v = heads(6, 9, dtype=dtype)
    shape = (2, 3, 9) if by_head else (2, 9)
    bias, lengths = jnp.linspace(-2, 2, math.prod(shape)).reshape(shape), jnp.array([9, 4])
    bias = bias.at[..., 2].set(-jnp.inf)

    def biased(q, bias):
        return attend(q, k, v, key_bias=bias, key_lengths=lengths)

    expected = reference(q, k, v, bias, lengths)[1]
    np.testing.assert_allclose(np.asarray(biased(q, bias), np.float64), expected, atol=0.03)
    # A masked key gets no weight at all, however large its value, and no gradient.
    huge = attend(q, k, v.at[:, 2].set(1e4), key_bias=bias, key_lengths=lengths)
    np.testing.assert_array_equal(huge, biased(q, bias))
    slopes = jax.grad(lambda q, bias: jnp.square(biased(q, bias)).sum(), argnums=(0, 1))(q, bias)
    assert all(jnp.isfinite(slope).all() for slope in slopes) and not slopes[1][..., 2].any()
    assert set(plain_cudnn) == {"cudnn"}


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_scores_with_a_bias(implementation, plain_cudnn):
    """A key that is masked gets nothing."""
    kernels = {"xla": xla, "cudnn": cudnn}[implementation]
    q, k, v = heads(9, 13, count=2, size=16)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 13)), jnp.float32)
    bias = bias.at[0, 0, 4].set(-jnp.inf)
    weights, expected = reference(q, k, v, bias)
    out, columns = jax.jit(kernels.attend_and_score)(q, k, v, bias)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    np.testing.assert_allclose(columns, weights.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(xla.column_mean(q, k, bias), weights.mean((1, 2)), atol=1e-6)

    def loss(kernels, *arrays):
        return (kernels.attend_and_score(*arrays)[1] * jnp.arange(13)).sum()

    slopes, plain = (
        jax.jit(jax.grad(functools.partial(loss, each), (0, 3)))(q, k, v, bias)
        for each in (kernels, xla)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), slopes, plain)


def parts(joined, count):
    """Three parts of an array."""
    return tuple(Heads(joined, place * count, count) for place in range(3))


def test_heads_of_a_joined_array(plain_cudnn):
    """What cannot read them where they lie gets them cut out."""
    q, k, v = heads(7, 7)
    joined = jnp.concatenate([q, k, v], axis=2)
    for part, x in zip(parts(joined, 3), (q, k, v), strict=True):
        np.testing.assert_array_equal(part.array, x)
        assert (part.shape, part.dtype) == (x.shape, x.dtype)
    assert Heads.of(q).array is q
    for implementation in ("xla", "cudnn"):
        for operation in (attend, attend_and_score):
            found = operation(*parts(joined, 3), implementation=implementation)
            expected = operation(q, k, v, implementation=implementation)
            jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("apart", [True, False])
def test_the_gradient_of_joined_heads_is_that_of_cudnn(apart, plain_cudnn):
    q, k, v = heads(7, 7)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 7)), jnp.float32)
    lengths = jnp.array([5, 5])

    def loss(joined, q, bias):
        own, k, v = parts(joined, 3)
        q = q if apart else own
        return (
            jnp.sin(hopper.attend(q, k, v, bias)).sum()
            + jnp.cos(hopper.attend(q, k, v, None, 5)).sum()
        )

    def plain(q, k, v, bias):
        return (
            jnp.sin(xla.attend(q, k, v, bias)).sum()
            + jnp.cos(xla.attend(q, k, v, None, lengths)).sum()
        )

    joined = jnp.concatenate([q, k, v], axis=2)
    slopes, of_q, of_bias = jax.jit(jax.grad(loss, (0, 1, 2)))(joined, q, bias)
    expected = jax.jit(jax.grad(plain, (0, 1, 2, 3)))(q, k, v, bias)
    np.testing.assert_allclose(of_q if apart else slopes[:, :, :3], expected[0], atol=2e-5)
    np.testing.assert_allclose(slopes[:, :, 3:], jnp.concatenate(expected[1:3], 2), atol=2e-5)
    np.testing.assert_allclose(of_bias, expected[3], atol=2e-5)
    assert set(plain_cudnn) == {"cudnn"}


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
def test_one_length_of_all_images(implementation, layout_or_file, plain_cudnn):
    q, k, v = heads(5, 9)
    out = attend(q, k, v, key_lengths=6, implementation=implementation)
    np.testing.assert_allclose(out, reference(q, k[:, :6], v[:, :6])[1], atol=3e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_sums_the_columns_in_its_backward_pass(dtype, plain_cudnn):
    """Over a ViT's heads and channels the roundings of the sums average out."""
    q, k, v = heads(45, 45, count=16, size=64, dtype=dtype)
    out, columns = attend_and_score(q / 4, k, v)
    weights, expected = reference(q / 4, k, v)
    assert columns.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.03)
    np.testing.assert_allclose(columns, weights.mean((1, 2)), rtol=1e-3)
    assert set(plain_cudnn) == {"cudnn"}

    def loss(implementation, *arrays):
        out, columns = attend_and_score(*arrays, implementation=implementation)
        return jnp.square(out.astype(jnp.float32)).sum() + (columns * jnp.arange(45)).sum()

    slopes = [
        jax.grad(lambda *x, by=by: loss(by, *x), (0, 1, 2))(q / 4, k, v) for by in ("cudnn", "xla")
    ]
    for got, plain in zip(*slopes, strict=True):
        got, plain = (np.asarray(x, np.float64) for x in (got, plain))
        assert np.abs(got - plain).max() <= 0.02 * np.abs(plain).max()


class TestChooseImplementation:
    def test_xla_runs_everywhere(self):
        assert choose_implementation("xla", jnp.float32, 7) == "xla"
        assert choose_implementation("auto", jnp.bfloat16, 64) == "xla"

    def test_unknown_name(self):
        with pytest.raises(InputError, match="auto, hopper, cudnn, xla: 'flash'"):
            choose_implementation("flash", jnp.float32, 64)

    @pytest.mark.parametrize("name", ["hopper", "cudnn"])
    def test_a_gpus_kernels_on_a_cpu(self, name):
        with pytest.raises(InputError, match="the device is a cpu, not an NVIDIA GPU"):
            choose_implementation(name, jnp.bfloat16, 64)

    @pytest.mark.parametrize(
        ("capability", "dtype", "size", "reason"),
        [
            ("9.0", jnp.bfloat16, 64, None),
            ("8.0", jnp.float16, 80, None),
            ("7.0", jnp.bfloat16, 64, "compute capability 7.0 is below 8.0"),
            ("9.0", jnp.float32, 64, "the model computes in float32"),
            ("9.0", jnp.bfloat16, 20, "head size 20 is not divisible by 8"),
            ("9.0", jnp.bfloat16, 248, None),
            ("8.0", jnp.bfloat16, 128, "head size 128 is above 120"),
            ("gfx942", jnp.bfloat16, 64, "a GPU of kind gfx942, not one of NVIDIA"),
        ],
    )
    def test_needs_of_cudnn(self, monkeypatch, capability, dtype, size, reason):
        device = type("Device", (), {"compute_capability": capability})()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: "not asked about")
        assert choose_implementation("auto", dtype, size) == ("xla" if reason else "cudnn")
        if reason:
            with pytest.raises(InputError, match=reason):
                choose_implementation("cudnn", dtype, size)

    @pytest.mark.parametrize(
        ("capability", "dtype", "size", "reason"),
        [
            ("9.0", jnp.bfloat16, 64, None),
            ("9.0", jnp.float16, 80, None),
            ("9.0", jnp.bfloat16, 128, None),
            ("8.0", jnp.bfloat16, 64, "compute capability 8.0 is not 9.0"),
            ("10.0", jnp.bfloat16, 64, "compute capability 10.0 is not 9.0"),
            ("9.0", jnp.bfloat16, 72, "head size 72 is not one of 16, 32"),
            ("9.0", jnp.bfloat16, 144, "head size 144 is not one of 16, 32"),
        ],
    )
    def test_needs_of_our_kernel(self, monkeypatch, capability, dtype, size, reason):
        device = type("Device", (), {"compute_capability": capability})()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [device])
        assert choose_implementation("auto", dtype, size) == ("cudnn" if reason else "hopper")
        if reason:
            with pytest.raises(InputError, match=reason):
                choose_implementation("hopper", dtype, size)

    def test_an_exported_program_holds_no_kernel_of_ours(self):
        with compiled_for("gpu"), pytest.raises(InputError, match="an exported program"):
            choose_implementation("hopper", jnp.bfloat16, 64)


@pytest.mark.parametrize(("count", "most", "size"), [(24, 4, 4), (24, 11, 8), (7, 4, 1), (6, 0, 1)])
def test_groups_are_equal(count, most, size):
    assert largest_divisor(count, most) == size


class TestHopper:
    """What can be known of the kernels where they cannot run."""

    @pytest.mark.parametrize(
        ("keys", "size", "blocks", "pieces"),
        [
            (1025, 64, (8, 1, 8, 64), ((0, 64),)),
            (1370, 80, (10, 90, 96, 128), ((0, 64), (64, 16))),
            (128, 96, (1, 0, 0, 0), ((0, 64), (64, 32))),
            (1, 48, (0, 1, 8, 64), ((0, 32), (32, 16))),
            (300, 128, (2, 44, 48, 64), ((0, 64), (64, 64))),
        ],
    )
    def test_how_the_work_is_cut(self, keys, size, blocks, pieces):
        plan = hopper_blocks.Plan.of(keys, size)
        found = plan.full, plan.rest, plan.scored, plan.last
        assert found == blocks and plan.pieces == pieces
        assert plan.groups == (3 if size <= 64 else 2)
        assert plan.stages == min(2, plan.full + (plan.last > 0))

    @pytest.mark.parametrize(("dtype", "atol"), [(jnp.bfloat16, 0), (jnp.float16, 1e-5)])
    def test_a_bias_is_exact_as_channels(self, dtype, atol):
        """Compiled too. float16 has nothing between 0 and 6e-5."""
        plan = hopper_blocks.Plan.of(1025, 64)
        bias = jnp.log(jnp.arange(1, 1026, dtype=jnp.float32))[None, None].at[..., 3].set(-jnp.inf)
        channels = jax.jit(lambda x: hopper_kernel.bias_channels(plan, x, dtype))(bias)
        assert channels.shape == (1, 1, 1025, 16) and channels.dtype == dtype
        found = np.asarray(channels, np.float64).sum(-1) * plan.scale * np.log(2)
        assert np.all(np.exp(found[..., 3]) == 0)
        found, expected = (np.delete(x, 3, -1) for x in (found, np.asarray(bias, np.float64)))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=atol)

    @pytest.mark.parametrize(
        ("queries", "keys", "size", "bias"),
        [(1025, 1025, 64, None), (1370, 1370, 80, 1), (50, 50, 48, 4), (1, 256, 128, 1)],
    )
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_compiles_for_a_gpu(self, queries, keys, size, bias, dtype):
        q, k = (jax.ShapeDtypeStruct((2, n, 4, size), dtype) for n in (queries, keys))
        extra = [] if bias is None else [jax.ShapeDtypeStruct((2, bias, keys), jnp.float32)]
        for operation in (hopper.attend, hopper.attend_and_score):
            traced = jax.jit(operation).trace(q, k, k, *extra)
            program = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert "mosaic_gpu" in program

    def test_the_gradient_is_that_of_cudnn(self, plain_cudnn):
        q, k, v = heads(5, 9, size=16)
        bias = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 9)), jnp.float32)

        def loss(run, *inputs):
            return jnp.square(run(*inputs)).sum()

        ours, plain = (
            jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2, 3)))(q, k, v, bias)
            for run in (hopper.attend, xla.attend)
        )
        assert set(plain_cudnn) == {"cudnn"}
        for got, expected in zip(ours, plain, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-4)

    def test_joined_for_a_gpu(self):
        """No heads are cut out. Queries may be others than those beside the keys."""
        x = jax.ShapeDtypeStruct((1, 264, 12, 64), jnp.bfloat16)
        q = jax.ShapeDtypeStruct((1, 50, 4, 64), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((1, 1, 264), jnp.float32)

        def run(x, q, bias):
            own, k, v = parts(x, 4)
            scored = hopper.attend_and_score(own, k, v)[0]
            return hopper.attend(own, k, v, None, 257), hopper.attend(q, k, v, bias), scored

        traced = jax.jit(run).trace(x, q, bias)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in program and not re.search(r"stablehlo.slice.*bf16", program)
