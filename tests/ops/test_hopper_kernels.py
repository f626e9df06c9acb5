"""Our kernels for Hopper GPUs, against float64 NumPy: on the card, or interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.parameters import build_model
from hvit_jax.ops.attention import hopper
from hvit_jax.ops.float8 import FLOAT8
from hvit_jax.ops.grouping import Groups
from hvit_jax.ops.matching import match_tokens
from hvit_jax.ops.merging import merge_and_normalise, merge_tokens
from hvit_jax.reducers import make_reducer
from tests.ops import gpu_interpreter
from tests.ops.test_attention import heads, parts, reference
from tests.small_models import loud_parameters

NO_HOPPER = hopper.obstacle(jnp.bfloat16, 64)
CANNOT_RUN = f"our kernels cannot run here: {NO_HOPPER}"


def on_the_card(*case):
    """Mark a case that the interpreter takes too long for, or whose kernel is cuDNN's."""
    marks = pytest.mark.gpu, pytest.mark.skipif(NO_HOPPER is not None, reason=CANNOT_RUN)
    return pytest.param(*case, marks=marks)


@pytest.fixture(autouse=True)
def kernels_run():
    if NO_HOPPER is None:
        yield
    elif obstacle := gpu_interpreter.obstacle():
        pytest.skip(f"{CANNOT_RUN}. {obstacle}")
    else:
        with gpu_interpreter.interpreted():
            yield


def make_bias(count, keys):
    """A bias of so many heads, which masks a key; None for no heads."""
    if not count:
        return None
    bias = np.random.default_rng(1).normal(size=(2, count, keys))
    return jnp.asarray(bias, jnp.float32).at[:, :, 3:4].set(-jnp.inf)


def check(out, expected):
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=0.06)


@pytest.mark.parametrize(
    ("queries", "keys", "size", "heads_of_bias"),
    [
        (1, 1, 16, 0),
        (50, 64, 48, 1),
        (200, 300, 64, 0),
        (70, 385, 80, 3),
        (130, 257, 128, 1),
        *(
            on_the_card(queries, keys, size, heads_of_bias)
            for queries, keys in [(1, 1), (50, 64), (130, 257), (1025, 1025)]
            for size in [16, 48, 64, 80, 96, 128]
            for heads_of_bias in [0, 1, 3]
        ),
    ],
)
def test_attention(queries, keys, size, heads_of_bias):
    q, k, v = heads(queries, keys, size=size, dtype=jnp.bfloat16)
    bias = make_bias(heads_of_bias, keys)
    check(hopper.attend(q, k, v, bias), reference(q, k, v, bias)[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_whole_block_of_keys_is_masked(dtype):
    """What it adds up to before the first key that counts has no part in the result."""
    q, k, v = heads(20, 140, size=16, dtype=dtype)
    sizes = np.random.default_rng(1).integers(1, 200, (2, 1, 140))
    bias = jnp.log(jnp.asarray(sizes, jnp.float32)).at[..., :135].set(-jnp.inf)
    check(hopper.attend(q, k, v, bias), reference(q, k, v, bias)[1])


@pytest.mark.parametrize(
    ("queries", "keys", "size", "heads_of_bias"),
    [
        (50, 64, 48, 0),
        (70, 130, 80, 3),
        *(on_the_card(1025, 1025, 64, count) for count in [0, 1, 3]),
        *(on_the_card(257, 130, 80, count) for count in [0, 1, 3]),
    ],
)
def test_attention_with_scores(queries, keys, size, heads_of_bias):
    q, k, v = heads(queries, keys, size=size, dtype=jnp.bfloat16)
    bias = make_bias(heads_of_bias, keys)
    out, columns = hopper.attend_and_score(q, k, v, bias)
    weights, expected = reference(q, k, v, bias)
    check(out, expected)
    np.testing.assert_allclose(columns, weights.mean((1, 2)), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "size", "keys"),
    [(9, 16, 9), (136, 64, 131), on_the_card(1032, 64, 1025), on_the_card(1376, 80, 1370)],
)
def test_joined_heads(tokens, size, keys):
    q, k, v = heads(tokens, tokens, size=size, dtype=jnp.bfloat16)
    own, *others = parts(jnp.concatenate([q, k, v], axis=2), 3)
    check(hopper.attend(own, *others, None, keys), reference(q, k[:, :keys], v[:, :keys])[1])


@pytest.mark.parametrize(("queries", "keys", "size"), [(50, 70, 48), on_the_card(995, 1025, 64)])
def test_joined_keys_and_values(queries, keys, size):
    """Of queries that lie apart, and with a bias."""
    q, k, v = heads(queries, keys, size=size, dtype=jnp.bfloat16)
    bias = make_bias(1, keys)
    others = parts(jnp.concatenate([v, k, v], axis=2), 3)[1:]
    check(hopper.attend(q, *others, bias), reference(q, k, v, bias)[1])


@pytest.mark.parametrize(("tokens", "size"), [(70, 48), on_the_card(1025, 64)])
def test_joined_heads_with_scores(tokens, size):
    q, k, v = heads(tokens, tokens, size=size, dtype=jnp.bfloat16)
    bias = make_bias(1, tokens)
    joined = jnp.concatenate([q, k, v], axis=2)
    out, columns = hopper.attend_and_score(*parts(joined, 3), bias)
    weights, expected = reference(q, k, v, bias)
    check(out, expected)
    np.testing.assert_allclose(columns, weights.mean((1, 2)), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("tokens", "length"),
    [(136, 100), *(on_the_card(1032, length) for length in [1, 100, 128, 1025])],
)
def test_one_length_of_all_images(tokens, length):
    q, k, v = heads(tokens, tokens, size=64, dtype=jnp.bfloat16)
    out = hopper.attend(q, k, v, key_lengths=length)
    check(out, reference(q, k[:, :length], v[:, :length])[1])


@pytest.mark.parametrize("lengths", [on_the_card([257, 254])])
def test_lengths(lengths):
    q, k, v = heads(130, 257, size=64, dtype=jnp.bfloat16)
    lengths = jnp.array(lengths)
    check(hopper.attend(q, k, v, None, lengths), reference(q, k, v, None, lengths)[1])


@pytest.mark.parametrize(
    ("tokens", "size", "dtype"),
    [
        (5, 16, jnp.bfloat16),
        (131, 64, jnp.bfloat16),
        (257, 80, jnp.float16),
        on_the_card(1025, 64, jnp.bfloat16),
        on_the_card(1370, 80, jnp.bfloat16),
        on_the_card(300, 128, jnp.float16),
    ],
)
def test_weights_are_multiplied_by_counts_of_meetings(tokens, size, dtype):
    """A query takes nothing from a key that it does not meet, however large their product.

    Nor from whole blocks of such keys.
    """
    q, k, v = heads(tokens, tokens, size=size, dtype=dtype)
    k = k.at[:, 1].set(30 * q[:, 0])
    rng = np.random.default_rng(1)
    clusters = rng.integers(1, 5, (2, 2, 3, 7, tokens))
    # The first query meets the first key alone, the last one the last.
    clusters[..., 0], clusters[..., -1] = 0, 5
    joined = jnp.concatenate([q, k, v], axis=2)
    out = hopper.attend_in_clusters(
        *parts(joined, 3), *(jnp.asarray(x, jnp.int8) for x in clusters), 6
    )
    counts = (clusters[0][..., None] == clusters[1][..., None, :]).sum(2)
    scores = np.einsum("bnhd,bmhd->bhnm", *(np.asarray(x, np.float64) for x in (q, k))) / size**0.5
    scores = np.where(counts > 0, scores, -np.inf)
    weights = counts * np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    check(out, np.einsum("bhnm,bmhd->bnhd", weights, np.asarray(v, np.float64)))


@pytest.mark.parametrize(
    ("queries", "keys", "size", "heads_of_bias"),
    [(70, 130, 80, 1), (9, 9, 16, 0), on_the_card(1025, 1025, 64, 0), on_the_card(64, 300, 128, 3)],
)
def test_attention_rounded_to_float8(queries, keys, size, heads_of_bias):
    """Every channel by its own power of two; what is too large becomes the largest."""
    arrays = heads(queries, keys, size=size, dtype=jnp.bfloat16)
    bias = make_bias(heads_of_bias, keys)
    powers = np.random.default_rng(2).integers(-2, 9, (3, size))
    factor = jnp.asarray(2.0**powers, jnp.bfloat16)
    out = hopper.attend(*arrays, bias, factor=factor.reshape(-1))
    assert out.dtype == FLOAT8
    exact = hopper.attend(*arrays, bias).astype(jnp.float32) * factor
    out, exact = np.asarray(out, np.float32), np.clip(exact, -448, 448)
    # Half a step each of e4m3, whose steps are 2^-9 at least, and of bfloat16.
    np.testing.assert_allclose(out, exact, rtol=2**-4 + 2**-9, atol=2**-10)
    assert 0 < np.mean(np.abs(out) == 448) < 0.05


@pytest.mark.parametrize(
    ("tokens", "groups", "size"),
    [
        (1, 1, 16),
        (140, 70, 80),
        (300, 7, 64),
        on_the_card(1025, 480, 64),
        on_the_card(1370, 570, 80),
    ],
)
def test_means_of_groups(tokens, groups, size):
    """Zeros for a group without members; the gradient is that of means computed otherwise."""
    x, *_ = heads(tokens, tokens, size=size, dtype=jnp.bfloat16)
    members = jnp.asarray(np.random.default_rng(0).integers(groups + 1, size=(2, 3, tokens)))
    hot = np.asarray(members)[:, :, None] == np.arange(groups + 1)[:, None]
    counts = np.maximum(hot.sum(-1), 1).swapaxes(1, 2)[..., None]
    held = jnp.asarray(hot.sum(-1))
    grouped = Groups(members, members, members, held, held, held[..., 0])
    means, pull = jax.vjp(lambda x: hopper.average_groups(x, grouped), x)
    check(means, np.einsum("bhkn,bnhd->bkhd", hot, np.asarray(x, np.float64)) / counts)
    slope = jnp.asarray(np.random.default_rng(1).normal(size=means.shape), means.dtype)
    shares = np.asarray(slope, np.float64) / counts
    check(pull(slope)[0], np.einsum("bhkn,bkhd->bnhd", hot, shares))


@pytest.mark.parametrize(
    ("tokens", "r", "prefix", "dtype"),
    [
        (21, 7, 1, jnp.bfloat16),
        (22, 4, 3, FLOAT8),
        on_the_card(1025, 40, 1, jnp.bfloat16),
        on_the_card(1370, 500, 0, FLOAT8),
    ],
)
def test_merging(tokens, r, prefix, dtype):
    """Several tokens join one; sizes need all bits of float32."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, tokens, 512)), jnp.bfloat16)
    sizes = jnp.asarray(rng.integers(1, 9999, (2, tokens)), jnp.float32)
    scale, bias = jnp.asarray(rng.normal(size=(2, 512)), jnp.float32)
    metric = jnp.asarray(rng.integers(-9, 9, (2, tokens, 2)), jnp.float32)
    matching = match_tokens(metric, r=r, prefix=prefix)
    assert len(set(matching.targets[0].tolist())) < r
    given = x, sizes, matching, scale, bias
    merged, totals, normed = merge_and_normalise(*given, epsilon=1e-6, dtype=dtype)
    expected, total = merge_tokens(x.astype(jnp.float32), sizes, matching)
    np.testing.assert_array_equal(totals, total)
    np.testing.assert_allclose(merged.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)
    rows = np.asarray(merged, np.float64)
    rows = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-6)
    scale, bias = (np.asarray(each.astype(jnp.bfloat16), np.float64) for each in (scale, bias))
    expected = rows * scale + bias
    rounding = 2.0**-4 if dtype == FLOAT8 else 2.0**-8
    normed = np.asarray(normed, np.float64)
    np.testing.assert_allclose(normed, expected, rtol=1.1 * rounding, atol=rounding / 8)
    assert normed.shape == (2, tokens - r, 512)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_block_merges_as_without_the_kernel(dtype, monkeypatch):
    """XLA rounds to bfloat16 before float8, by which some numbers go to the other neighbour."""
    monkeypatch.setattr(hopper, "obstacle", lambda dtype, size: None)
    config = ViTConfig((32, 32), 16, depth=1, width=256, heads=4, mlp_width=64, num_classes=0)
    weights, rng = loud_parameters(config), np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, 256)), jnp.bfloat16)
    sizes = jnp.asarray(rng.integers(1, 9, (2, 9)), jnp.float32)
    matching = match_tokens(x, r=3)

    def merge(attention):
        compute = Compute(dtype, attention=attention)
        graph, blocks = nnx.split(build_model(config, make_reducer("tome", r=1), weights, compute))
        (block,) = nnx.merge(graph, jax.tree.map(lambda x: x[0], blocks)).segments
        return block.merge(x, sizes, matching)

    for found, expected in zip(merge("hopper"), merge("xla"), strict=True):
        assert found.dtype == expected.dtype
        found, expected = (np.asarray(each, np.float64) for each in (found, expected))
        step = 2.0**-3 if dtype == "float8" else 2.0**-7
        np.testing.assert_allclose(found, expected, rtol=step, atol=2**-9)
        assert np.mean(found != expected) < 0.05
