"""Agglomerative clustering with static shapes: join the closest pair, again and again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import gather
from hvit_jax.ops.matching import unit_vectors
from hvit_jax.ops.precision import accurate_einsum


def cosine_distances(metric: Float[Array, "B P D"]) -> Float[Array, "B P P"]:
    """Compute 1 - cosine of all pairs in float32; no gradient flows through it."""
    unit = unit_vectors(metric)
    return 1 - accurate_einsum("bnd,bmd->bnm", unit, unit)


def agglomerate(
    distances: Float[Array, "B P P"], *, joins: int, linkage: str = "average"
) -> Int[Array, "B P"]:
    """Join clusters until P - joins remain.

    Every patch begins alone. The closest pair of clusters becomes one, of equally close ones the
    first, and its distance to another is the "average" of its members' distances, the "complete"
    (largest) or the "single" (smallest) one.

    Args:
        distances: of the patches, symmetric.
        joins: how many pairs are joined, at most P - 1.
        linkage: see there.

    Returns:
        The number of each patch's cluster; clusters are numbered by their first patches.
    """
    size = distances.shape[1]
    here = jnp.arange(size, dtype=jnp.int32)[None]

    def join(_, carry):
        distances, members, cluster = carry
        # The closest cluster of each stands in its row; of these the first closest is taken.
        first = distances.min(2).argmin(1).astype(jnp.int32)[:, None]
        row = gather(distances, first)[:, 0]
        second = row.argmin(1).astype(jnp.int32)[:, None]
        counts = gather(members, first), gather(members, second)
        linked = _linked(row, gather(distances, second)[:, 0], *counts, linkage)
        at_first, at_second = here == first, here == second
        linked = jnp.where(at_first | at_second | (members == 0), jnp.inf, linked)
        distances = jnp.where(at_first[:, :, None], linked[:, None], distances)
        distances = jnp.where(at_first[:, None], linked[:, :, None], distances)
        distances = jnp.where(at_second[:, :, None] | at_second[:, None], jnp.inf, distances)
        members = jnp.where(at_first, counts[0] + counts[1], jnp.where(at_second, 0, members))
        return distances, members, jnp.where(cluster == second, first, cluster)

    alone = jnp.broadcast_to(here, distances.shape[:2])
    apart = jnp.where(here[..., None] == here[:, None], jnp.inf, distances)
    start = apart, jnp.ones_like(alone), alone
    # A cluster keeps the number of its first patch: `first` is below `second`.
    _, _, cluster = jax.lax.fori_loop(0, joins, join, start)
    numbers = jnp.cumsum(cluster == here, axis=1, dtype=jnp.int32) - 1
    return gather(numbers, cluster)


def _linked(first, second, count_first, count_second, linkage: str):
    if linkage == "complete":
        return jnp.maximum(first, second)
    if linkage == "single":
        return jnp.minimum(first, second)
    counts = count_first.astype(first.dtype), count_second.astype(first.dtype)
    return (counts[0] * first + counts[1] * second) / (counts[0] + counts[1])
