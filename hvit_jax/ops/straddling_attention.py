"""SMYRF's attention as the original computes it, where results depend on the batch."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.errors import InputError
from hvit_jax.ops.hashing import ProjectionDraws, project_asymmetric
from hvit_jax.ops.rounds import attend_inside, finish, join_rounds, nothing, sort_rows


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
        return sort_rows(x, orders).reshape(-1, cluster_size, x.shape[-1])

    part = attend_inside(cut(q, q_orders), cut(k, k_orders), cut(v, k_orders))
    rows = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), part)
    return finish(join_rounds(nothing(q), rows, q_orders), q.dtype).swapaxes(1, 2)
