"""Attention inside clusters of sorted queries and keys, SMYRF (Daras et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hvit_jax.errors import InputError
from hvit_jax.ops.hashing import ProjectionDraws, project_asymmetric
from hvit_jax.ops.precision import accumulator

# Rounds that run at once, times images: few leave a GPU idle, many fill its memory.
PASSES_TOGETHER = 32


def clustered_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    draws: ProjectionDraws,
    *,
    q_cluster_size: int,
    k_cluster_size: int,
) -> Float[Array, "B N H D"]:
    """Attend inside clusters of queries and keys, in several rounds of hashing.

    In every round queries and keys of an image and head are sorted by their projection and cut into
    clusters; a query sees the keys of the cluster of the same number. A softmax over the rounds'
    log-sum-exp joins them, so a round counts for a query by how much attention it caught.

    Args:
        q: queries.
        k: keys.
        v: values.
        draws: the random directions; their columns are the rounds.
        q_cluster_size: queries in a cluster; the last cluster takes what is left.
        k_cluster_size: keys in a cluster; must give as many clusters.

    Returns:
        Attended values in the dtype of `q`. The forward pass's memory does not grow with the
        rounds: at most as many run at once as make 32 with the images of the batch.

    Raises:
        InputError: if queries and keys give different numbers of clusters.

    Differs from the original: it cuts the joined list of all rounds, images and heads, so that
    clusters straddle them unless the size divides N; see `straddling_attention`.
    """
    size = q.shape[1]
    clusters, k_clusters = -(-size // q_cluster_size), -(-size // k_cluster_size)
    if clusters != k_clusters:
        raise InputError(
            f"{size} tokens make {clusters} clusters of {q_cluster_size} queries but {k_clusters} "
            f"of {k_cluster_size} keys; the numbers must be equal"
        )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    real = jnp.arange(clusters * k_cluster_size).reshape(clusters, 1, k_cluster_size) < size

    def cut(x, orders, length):
        padding = ((0, 0),) * 3 + ((0, clusters * length - size),)
        rows = _sorted(x, jnp.pad(orders, padding))
        return rows.reshape(*orders.shape[:3], clusters, length, -1)

    def step(joined, projections):
        q_orders, k_orders = (jnp.argsort(part) for part in projections)
        keys, values = cut(k, k_orders, k_cluster_size), cut(v, k_orders, k_cluster_size)
        part = _attend(cut(q, q_orders, q_cluster_size), keys, values, real)
        rows = jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1, *x.shape[5:]), part)
        return _join_rounds(joined, rows, q_orders), None

    together = _rounds_together(draws.beta.size, len(q))
    projections = jax.tree.map(
        lambda x: x.reshape(-1, together, *x.shape[1:]), project_asymmetric(q, k, draws)
    )
    # The backward pass attends again, instead of keeping every round's weights.
    step = jax.checkpoint(step, prevent_cse=False)
    return _finish(jax.lax.scan(step, _nothing(q), projections)[0], q.dtype)


def straddling_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    draws: ProjectionDraws,
    *,
    cluster_size: int,
) -> Float[Array, "B N H D"]:
    """Attend as the original does where the cluster size does not divide N.

    The sorted lists of all rounds, images and heads are joined before they are cut, so that
    clusters straddle heads, images and rounds, and an image's result depends on its batch.

    Args:
        q: queries.
        k: keys.
        v: values.
        draws: the random directions; their columns are the rounds.
        cluster_size: queries in a cluster, and keys.

    Returns:
        Attended values in the dtype of `q`. Memory grows with the rounds.

    Raises:
        InputError: if the joined list cannot be cut into whole clusters.
    """
    batch, size, heads, _ = q.shape
    shape = (draws.beta.size, batch, heads, size)
    if math.prod(shape) % cluster_size:
        raise InputError(
            f"straddling clusters of {cluster_size} do not divide {shape[0]} rounds x {batch} "
            f"images x {heads} heads x {size} tokens; change the batch, or set straddle=False"
        )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q_orders, k_orders = (jnp.argsort(part) for part in project_asymmetric(q, k, draws))

    def cut(x, orders):
        return _sorted(x, orders).reshape(-1, cluster_size, x.shape[-1])

    part = _attend(cut(q, q_orders), cut(k, k_orders), cut(v, k_orders))
    rows = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), part)
    return _finish(_join_rounds(_nothing(q), rows, q_orders), q.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Attended:
    """A softmax on its way: weighted values, the sum of weights, and what they are relative to."""

    values: Float[Array, "*rows D"]
    total: Float[Array, "*rows"]
    highest: Float[Array, "*rows"]


def _nothing(q: Float[Array, "B H N D"]) -> _Attended:
    zeros = jnp.zeros(q.shape, accumulator(q.dtype))
    return _Attended(zeros, zeros[..., 0], zeros[..., 0] - jnp.inf)


def _attend(q, k, v, real: Bool[Array, "*rows"] | bool = True) -> _Attended:
    """Attend to the keys of the same cluster; only those count that are real, not padding."""
    wide = accumulator(q.dtype)
    scores = jnp.einsum("...id,...jd->...ij", q, k, preferred_element_type=wide)
    scores = jnp.where(real, scores * q.shape[-1] ** -0.5, -jnp.inf)
    highest = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - highest[..., None])
    values = jnp.einsum(
        "...ij,...jd->...id", weights.astype(v.dtype), v, preferred_element_type=wide
    )
    return _Attended(values, weights.sum(-1), highest)


def _join(first: _Attended, second: _Attended) -> _Attended:
    """Join two softmaxes over different keys to the softmax over both."""
    highest = jnp.maximum(first.highest, second.highest)
    ours, theirs = jnp.exp(first.highest - highest), jnp.exp(second.highest - highest)
    values = ours[..., None] * first.values + theirs[..., None] * second.values
    return _Attended(values, ours * first.total + theirs * second.total, highest)


def _join_rounds(joined: _Attended, rounds: _Attended, q_orders) -> _Attended:
    """Put the queries of some rounds back in order, and join the rounds."""
    places = jnp.argsort(q_orders)
    for index in range(len(places)):
        one = jax.tree.map(lambda x, i=index: _rows(x[i], places[i]), rounds)
        joined = _join(joined, one)
    return joined


def _finish(joined: _Attended, dtype):
    return (joined.values / joined.total[..., None]).swapaxes(1, 2).astype(dtype)


def _sorted(x, orders):
    """Sort rows of (B, H, N, D) in the order of every round, (rounds, B, H, N)."""
    return jax.vmap(_rows, (None, 0))(x, orders)


def _rows(x, order):
    places = order.reshape(*order.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, places, axis=2, mode="promise_in_bounds")


def _rounds_together(rounds: int, batch: int) -> int:
    """Choose how many rounds run at once, a divisor of all rounds."""
    fitting = [count for count in range(1, rounds + 1) if count * batch <= PASSES_TOGETHER]
    return max((count for count in fitting if rounds % count == 0), default=1)
