"""SMYRF's attention inside clusters, against NumPy and the golden numbers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvit_jax.errors import InputError
from hvit_jax.ops import clustered_attention as module
from hvit_jax.ops.attention import attend, attend_in_clusters, cudnn, hopper, meetings, xla
from hvit_jax.ops.attention.heads import Heads, array_of
from hvit_jax.ops.hashing import ProjectionDraws, draw_projections, project_asymmetric
from tests.golden import Goldens

clustered_attention = jax.jit(
    module.clustered_attention, static_argnames=("q_cluster_size", "k_cluster_size")
)
straddling_attention = jax.jit(module.straddling_attention, static_argnames=("cluster_size",))


def tokens(seed, batch=2, size=11, heads=2, width=6):
    return jax.random.normal(jax.random.key(seed), (3, batch, size, heads, width))


def attend_in_numpy(q, k, v, draws, q_cluster_size, k_cluster_size):
    """One image and head: the rounds of SMYRF, each a mask on the full attention."""
    q, k, v, alpha, beta = (np.asarray(x, np.float64) for x in (q, k, v, *draws))
    q_norms, k_norms = np.square(q).sum(-1), np.square(k).sum(-1)
    radius = q_norms.max() + k_norms.max()
    weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
    outs, totals = [], []
    for direction, shift in zip(alpha.T, beta, strict=True):
        of_q = q @ direction[:-2] + direction[-1] * np.sqrt(radius - q_norms) + shift
        of_k = k @ direction[:-2] + direction[-2] * np.sqrt(radius - k_norms) + shift
        q_cluster = np.argsort(np.argsort(of_q)) // q_cluster_size
        k_cluster = np.argsort(np.argsort(of_k)) // k_cluster_size
        inside = weights * (q_cluster[:, None] == k_cluster)
        totals.append(inside.sum(-1))
        outs.append(inside @ v / totals[-1][:, None])
    shares = np.stack(totals) / np.sum(totals, axis=0)
    return (shares[..., None] * np.stack(outs)).sum(0)


def test_hand_computed():
    """One channel that does not vary in norm, one round along it: sorting is by the sign.

    Queries -1, 1, 1, -1 give the clusters {0, 3} and {1, 2}; keys 1, -1, -1, 1 the clusters {1, 2}
    and {0, 3}. Inside a cluster all products are equal, so the values are averaged.
    """
    q = jnp.array([-1.0, 1.0, 1.0, -1.0])[None, :, None, None]
    v = jnp.array([1.0, 2.0, 4.0, 8.0])[None, :, None, None]
    draws = ProjectionDraws(jnp.array([[1.0], [0.0], [0.0]]), jnp.array([0.5]))
    out = clustered_attention(q, -q, v, draws, q_cluster_size=2, k_cluster_size=2)
    np.testing.assert_allclose(out[0, :, 0, 0], [3.0, 4.5, 4.5, 3.0], rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(11, 4, 4, 3), (11, 1, 1, 1), (10, 5, 5, 2), (9, 4, 3, 3), (7, 5, 6, 1)]),
    st.integers(0, 999),
)
def test_ragged_clusters_equal_numpy(sizes, seed):
    size, q_cluster_size, k_cluster_size, rounds = sizes
    q, k, v = tokens(seed, size=size)
    draws = draw_projections(jax.random.key(seed + 1), 6, rounds)
    options = {"q_cluster_size": q_cluster_size, "k_cluster_size": k_cluster_size}
    out = clustered_attention(q, k, v, draws, **options)
    for image, head in np.ndindex(2, 2):
        parts = (x[image, :, head] for x in (q, k, v))
        expected = attend_in_numpy(*parts, draws, **options)
        np.testing.assert_allclose(out[image, :, head], expected, atol=2e-6)


@pytest.mark.parametrize("cluster", [11, 40])
def test_one_cluster_is_full_attention(cluster):
    q, k, v = tokens(0)
    draws = draw_projections(jax.random.key(1), 6, 3)
    out = clustered_attention(q, k, v, draws, q_cluster_size=cluster, k_cluster_size=cluster)
    np.testing.assert_allclose(out, attend(q, k, v), atol=1e-6)


def test_straddling_makes_no_difference_where_clusters_fit():
    q, k, v = tokens(2, size=12)
    draws = draw_projections(jax.random.key(3), 6, 5)
    fitting = clustered_attention(q, k, v, draws, q_cluster_size=4, k_cluster_size=4)
    straddling = straddling_attention(q, k, v, draws, cluster_size=4)
    np.testing.assert_allclose(fitting, straddling, atol=1e-6)


def test_straddling_clusters_depend_on_the_batch_and_others_do_not():
    q, k, v = tokens(4, batch=4, size=6)
    draws = draw_projections(jax.random.key(5), 6, 2)
    options = {"q_cluster_size": 4, "k_cluster_size": 4}
    whole = clustered_attention(q, k, v, draws, **options)
    half = clustered_attention(q[2:], k[2:], v[2:], draws, **options)
    np.testing.assert_allclose(whole[2:], half, atol=1e-6)
    whole = straddling_attention(q, k, v, draws, cluster_size=16)
    half = straddling_attention(q[2:], k[2:], v[2:], draws, cluster_size=16)
    assert np.abs(whole[2:] - half).max() > 1e-2


def test_more_clusters_and_rounds_than_a_byte_counts():
    q, k, v = tokens(6, batch=1, size=300, heads=1)
    draws = draw_projections(jax.random.key(7), 6, 200)
    options = {"q_cluster_size": 2, "k_cluster_size": 2}
    out = clustered_attention(q, k, v, draws, **options)[0, :, 0]
    expected = attend_in_numpy(*(x[0, :, 0] for x in (q, k, v)), draws, **options)
    # A rounding may order two of the 60,000 projections of each kind otherwise.
    assert np.median(np.abs(out - expected).max(-1)) < 1e-5


@pytest.mark.parametrize("rounds", [127, 128, 129])
def test_pairs_that_meet_in_every_round_at_the_end_of_a_byte(rounds):
    q, k, v = tokens(6, batch=1, size=9)
    draws = draw_projections(jax.random.key(7), 6, rounds)
    out = clustered_attention(q, k, v, draws, q_cluster_size=9, k_cluster_size=9)
    np.testing.assert_allclose(out, attend(q, k, v, implementation="xla"), atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_hardly_grows_with_the_rounds(gradient):
    q, k, v = tokens(6, batch=4, size=128, heads=4, width=64)

    def total(q, k, v, draws):
        return clustered_attention(q, k, v, draws, q_cluster_size=8, k_cluster_size=8).sum()

    def temporary_bytes(rounds):
        function = jax.grad(total, argnums=(0, 1, 2)) if gradient else total
        draws = draw_projections(jax.random.key(7), 64, rounds)
        compiled = jax.jit(function).lower(q, k, v, draws).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A round's queries, keys and values would take 768 bytes for each of 16 * 128 tokens.
    assert temporary_bytes(32) - temporary_bytes(4) < 28 * 16 * 128 * 32


def test_bfloat16_is_close_and_large_scores_do_not_overflow():
    q, k, v = tokens(8) * jnp.array([30.0, 30.0, 1.0])[:, None, None, None, None]
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    draws = draw_projections(jax.random.key(9), 6, 4)
    options = {"q_cluster_size": 4, "k_cluster_size": 4}
    rough = clustered_attention(q, k, v, draws, **options)
    exact = clustered_attention(*(x.astype(jnp.float32) for x in (q, k, v)), draws, **options)
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("sizes", [(11, 4, 4, 6), (10, 5, 5, 2), (9, 4, 3, 5), (7, 5, 6, 1)])
def test_gradients_equal_those_of_masked_attention(sizes):
    """In float64, by XLA through all rounds at once: a round is a mask on the full attention."""
    size, q_cluster_size, k_cluster_size, rounds = sizes
    with jax.enable_x64(True):
        q, k, v, slope = jax.random.normal(jax.random.key(0), (4, 2, size, 2, 6), jnp.float64)
        draws = jax.tree.map(
            lambda x: x.astype(jnp.float64), draw_projections(jax.random.key(1), 6, rounds)
        )
        projections = project_asymmetric(q.swapaxes(1, 2), k.swapaxes(1, 2), draws)
        q_ranks, k_ranks = (np.argsort(np.argsort(part)) for part in projections)
        same = (q_ranks // q_cluster_size)[..., None] == (k_ranks // k_cluster_size)[..., None, :]

        def masked(q, k, v):
            scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) / jnp.sqrt(6.0)
            weights = (jnp.exp(scores) * same).sum(0)
            out = jnp.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)
            return (slope * out).sum()

        def clustered(q, k, v):
            sizes = {"q_cluster_size": q_cluster_size, "k_cluster_size": k_cluster_size}
            return (slope * module.clustered_attention(q, k, v, draws, **sizes)).sum()

        ours, theirs = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (clustered, masked)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), ours, theirs)


def test_gradients_equal_those_of_full_attention():
    q, k, v = tokens(10)
    draws = draw_projections(jax.random.key(11), 6, 2)

    def clustered(q, k, v):
        out = clustered_attention(q, k, v, draws, q_cluster_size=11, k_cluster_size=11)
        return jnp.square(out).sum()

    def full(q, k, v):
        return jnp.square(attend(q, k, v)).sum()

    pairs = zip(
        *(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (clustered, full)), strict=True
    )
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 121, 2**27])
def test_cudnn_gets_the_counts_as_a_bias(at_once, plain_cudnn):
    """For one image, for two or for all at once; gradients are those of the other program."""
    q, k, v = (x.astype(jnp.bfloat16) for x in tokens(10, batch=4, heads=3, width=8))
    draws = draw_projections(jax.random.key(3), 8, 5)
    fused = functools.partial(cudnn.attend_in_clusters, at_once=at_once)
    plain = functools.partial(attend_in_clusters, implementation="xla")

    def attend(inside, *heads):
        sizes = {"q_cluster_size": 4, "k_cluster_size": 4}
        return module.clustered_attention(*heads, draws, attend=inside, **sizes)

    def loss(inside, *heads):
        out = attend(inside, *heads).astype(jnp.float32)
        return (out * jnp.linspace(-1, 1, out.size).reshape(out.shape)).sum()

    outs = (np.asarray(attend(inside, q, k, v), np.float64) for inside in (fused, plain))
    np.testing.assert_allclose(*outs, atol=0.03)
    assert plain_cudnn == ["cudnn"]
    slopes = (jax.grad(lambda *x, f=f: loss(f, *x), (0, 1, 2))(q, k, v) for f in (fused, plain))
    for ours, theirs in zip(*slopes, strict=True):
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rounds", [1, 32, 45, 1024])
def test_words_of_digits_count_meetings(rounds, dtype):
    """Exactly; bfloat16 holds whole numbers up to 256 and then eight bits."""
    rng = np.random.default_rng(0)
    q_clusters, k_clusters = (rng.integers(0, 3, (1, 2, rounds, size)) for size in (11, 13))
    k_clusters[0, :, :, 4] = q_clusters[0, :, :, 2]  # These two meet in every round.
    expected = (q_clusters[..., :, None] == k_clusters[..., None, :]).sum(2)
    counts = meetings.count_meetings(
        jnp.asarray(q_clusters, jnp.int8),
        jnp.asarray(k_clusters, jnp.int8),
        3,
        shape=(16, 64),
        dtype=dtype,
    )
    counts = np.asarray(counts, np.float64)
    rounding = 2**-8 if rounds > 256 and dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(counts[:, :, :11, :13], expected, rtol=rounding)
    assert counts[0, 0, 2, 4] == rounds
    assert not counts[:, :, 11:].any() and not counts[..., 13:].any()


@pytest.mark.parametrize(
    ("size", "width", "dtype"),
    [(1025, 64, jnp.bfloat16), (1370, 80, jnp.float16), (50, 128, jnp.bfloat16)],
)
def test_our_kernel_gets_the_counts_as_weights(size, width, dtype):
    heads = jax.ShapeDtypeStruct((2, size, 3, width), dtype)
    clusters = jax.ShapeDtypeStruct((2, 3, 7, size), jnp.int8)
    attend = jax.jit(functools.partial(hopper.attend_in_clusters, clusters=5))
    traced = attend.trace(heads, heads, heads, clusters, clusters)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in program and "stablehlo.popcnt" in program
    assert "stablehlo.log" not in program
    assert not re.search(r"stablehlo.slice .*xb?f16>", program)


def test_gradients_of_heads_in_one_array():
    """They are those of three arrays, behind each other."""
    clusters = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 2, 2, 5, 11)), jnp.int8)

    def plain(q, k, v, q_clusters, k_clusters, clusters):
        return xla.attend_in_clusters(*map(array_of, (q, k, v)), q_clusters, k_clusters)

    def loss(*heads):
        return jnp.sin(meetings.attend_in_clusters(plain, *heads, *clusters, 3, 2**20)).sum()

    def joined(x):
        return loss(*(Heads(x, first, 2) for first in (0, 2, 4)))

    parts = tuple(tokens(5))
    slopes = jax.grad(loss, (0, 1, 2))(*parts)
    found = jax.grad(joined)(jnp.concatenate(parts, axis=2))
    np.testing.assert_allclose(found, jnp.concatenate(slopes, axis=2), atol=1e-6)


def test_cluster_sizes_that_do_not_match():
    q, k, v = tokens(0)
    draws = draw_projections(jax.random.key(1), 6, 3)
    with pytest.raises(InputError, match="11 tokens make 3 clusters of 4 queries but 4 of 3 keys"):
        clustered_attention(q, k, v, draws, q_cluster_size=4, k_cluster_size=3)
    with pytest.raises(InputError, match="of 5 do not divide 3 rounds x 2 images x 2 heads x 11"):
        straddling_attention(q, k, v, draws, cluster_size=5)


@pytest.mark.parametrize("case", Goldens().cases("smyrf_"))
def test_parity_smyrf(case, goldens):
    fields = goldens.case(case)
    q, k, v = (jnp.asarray(fields[name][None].swapaxes(1, 2)) for name in "qkv")
    assert fields["scale"] == pytest.approx(q.shape[-1] ** 0.5)
    draws = ProjectionDraws(jnp.asarray(fields["alpha"]), jnp.asarray(fields["beta"][0]))
    cluster = int(fields["cluster"])
    outs = [straddling_attention(q, k, v, draws, cluster_size=cluster)]
    if q.shape[1] % cluster == 0:
        options = {"q_cluster_size": cluster, "k_cluster_size": cluster}
        outs.append(clustered_attention(q, k, v, draws, **options))
    for out in outs:
        np.testing.assert_allclose(out[0].swapaxes(0, 1), fields["out"], atol=1e-5)
