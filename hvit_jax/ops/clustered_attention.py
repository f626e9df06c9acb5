"""Attention inside clusters of sorted queries and keys, SMYRF (Daras et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hvit_jax.errors import InputError
from hvit_jax.ops.hashing import ProjectionDraws, project_asymmetric
from hvit_jax.ops.rounds import attend_inside, finish, join_rounds, nothing, sort_rows, take_rows

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
        Attended values in the dtype of `q`. Memory, also of the gradient, does not grow with the
        rounds: at most as many run at once as make 32 with the images of the batch.

    Raises:
        InputError: if queries and keys give different numbers of clusters.

    Differs from the original: it cuts the joined list of all rounds, images and heads, so that
    clusters straddle them unless the size divides N; see `ops/straddling_attention.py`.
    """
    size = q.shape[1]
    clusters, k_clusters = -(-size // q_cluster_size), -(-size // k_cluster_size)
    if clusters != k_clusters:
        raise InputError(
            f"{size} tokens make {clusters} clusters of {q_cluster_size} queries but {k_clusters} "
            f"of {k_cluster_size} keys; the numbers must be equal"
        )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    together = _rounds_together(draws.beta.size, len(q))
    rounds = (
        draws.alpha.T.reshape(-1, together, len(draws.alpha)),
        draws.beta.reshape(-1, together),
    )
    return _all_rounds((q_cluster_size, k_cluster_size), q, k, v, rounds).swapaxes(1, 2)


def _attend_in_rounds(lengths, q, k, v, rounds) -> Float[Array, "B H N D"]:
    """Attend in some rounds at a time: `rounds` holds their directions and shifts."""
    return _forward(lengths, q, k, v, rounds)[0]


def _forward(lengths, q, k, v, rounds):
    """Join all rounds; for the backward pass keep the joined log-sum-exp, and no round's own."""
    real = _real(q.shape[2], lengths[1])

    def step(joined, some):
        q_orders, k_orders = _orders(q, k, *some)
        keys, values = (_cut(x, k_orders, lengths[1]) for x in (k, v))
        part = attend_inside(_cut(q, q_orders, lengths[0]), keys, values, real)
        return join_rounds(joined, jax.tree.map(_uncut, part), q_orders), None

    joined = jax.lax.scan(step, nothing(q), rounds)[0]
    out = finish(joined, q.dtype)
    return out, (q, k, v, rounds, out, joined.highest + jnp.log(joined.total))


def _backward(lengths, kept, slope):
    """Attend again, relative to the joined log-sum-exp: each round's weights are then final.

    As in FlashAttention (Dao et al. 2022), a score's slope is weight * (slope . v - slope . out),
    so that the rounds' slopes just add up. The order has none.
    """
    q, k, v, rounds, out, log_sum = kept
    real, slope = _real(q.shape[2], lengths[1]), slope.astype(log_sum.dtype)
    of_queries = (q, log_sum, slope, -(slope * out).sum(-1))

    def step(slopes, some):
        q_orders, k_orders = _orders(q, k, *some)
        queries, highest, *cotangents = (_cut(x, q_orders, lengths[0]) for x in of_queries)
        keys, values = (_cut(x, k_orders, lengths[1]) for x in (k, v))

        def attend(queries, keys, values):
            part = attend_inside(queries, keys, values, real, highest)
            return part.values, part.total

        parts = jax.vjp(attend, queries, keys, values)[1](tuple(cotangents))
        return tuple(map(_add_rounds, slopes, parts, (q_orders, k_orders, k_orders))), None

    start = tuple(jnp.zeros(x.shape, slope.dtype) for x in (q, k, v))
    slopes = jax.lax.scan(step, start, rounds)[0]
    return *(total.astype(q.dtype) for total in slopes), None


_all_rounds = jax.custom_vjp(_attend_in_rounds, nondiff_argnums=(0,))
_all_rounds.defvjp(_forward, _backward)


def _orders(q, k, alpha, beta):
    """Sort the queries and keys of every round, (rounds, B, H, N)."""
    projections = project_asymmetric(q, k, ProjectionDraws(alpha.T, beta))
    return tuple(jnp.argsort(part) for part in projections)


def _cut(x, orders, length):
    """Sort rows of (B, H, N, ...) in the order of every round, and cut; zeros fill the tail."""
    rows = sort_rows(x, orders)
    tail = [(0, 0)] * rows.ndim
    tail[3] = (0, -rows.shape[3] % length)
    return jnp.pad(rows, tail).reshape(*orders.shape[:3], -1, length, *x.shape[3:])


def _uncut(rows):
    return rows.reshape(*rows.shape[:3], -1, *rows.shape[5:])


def _real(size, length) -> Bool[Array, "clusters 1 length"]:
    """Tell the real keys of every cluster from the zeros that fill the last."""
    return jnp.arange(size + -size % length).reshape(-1, 1, length) < size


def _add_rounds(total, rows, orders):
    """Put rows of some rounds back in order, and add them up."""
    placed = jax.vmap(take_rows)(_uncut(rows), jnp.argsort(orders))
    return total + placed.sum(0, dtype=total.dtype)


def _rounds_together(rounds: int, batch: int) -> int:
    """Choose how many rounds run at once, a divisor of all rounds."""
    fitting = [count for count in range(1, rounds + 1) if count * batch <= PASSES_TOGETHER]
    return max((count for count in fitting if rounds % count == 0), default=1)
