"""Attention inside clusters of sorted queries and keys, SMYRF (Daras et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.attention import attend_in_clusters
from hvit_jax.ops.attention.heads import Heads, array_of
from hvit_jax.ops.hashing import ProjectionDraws, project_asymmetric
from hvit_jax.ops.precision import accumulator, smallest_integer
from hvit_jax.ops.sorting import argsort, inverse, numbers_of_parts


def clustered_attention(
    q: Heads | Float[Array, "B N H D"],
    k: Heads | Float[Array, "B N H D"],
    v: Heads | Float[Array, "B N H D"],
    draws: ProjectionDraws,
    *,
    q_cluster_size: int,
    k_cluster_size: int,
    attend: Callable[..., Array] = attend_in_clusters,
) -> Float[Array, "B N H D"]:
    """Attend inside clusters of queries and keys, in several rounds of hashing.

    In every round queries and keys of an image and head are sorted by their projection and cut into
    clusters; a query sees the keys of the cluster of the same number. A softmax over the rounds'
    log-sum-exp joins them, so a round counts for a query by how much attention it caught.

    That is full attention in which every pair's weight is multiplied by the number of rounds that
    it meets in. Counting these is cheaper than to sort, gather and attend in every round, up to
    the few thousand tokens of a picture.

    Args:
        q: queries.
        k: keys.
        v: values.
        draws: the random directions; their columns are the rounds.
        q_cluster_size: queries in a cluster; the last cluster takes what is left.
        k_cluster_size: keys in a cluster; must give as many clusters.
        attend: what attends, given the clusters; takes what `attend_in_clusters` takes.

    Returns:
        Attended values in the dtype of `q`. Beside a few numbers a token and head, its projections,
        rank and cluster, memory does not grow with the rounds.

    Raises:
        InputError: if queries and keys give different numbers of clusters, or as for `attend`.

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
    # Turned, they are copied anyway: parts of one array cost no more here.
    q_turned, k_turned = (array_of(x).swapaxes(1, 2) for x in (q, k))
    projections = project_asymmetric(q_turned, k_turned, draws)
    lengths, rounded = (q_cluster_size, k_cluster_size), jnp.dtype(q.dtype).itemsize < 4
    numbers = (
        numbers_of_parts(*pair, rounded=rounded) for pair in zip(projections, lengths, strict=True)
    )
    narrow = smallest_integer(clusters)
    numbers = (jnp.moveaxis(x, 0, 2).astype(narrow) for x in numbers)
    return attend(q, k, v, *numbers, clusters=clusters)


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
    q_orders, k_orders = (argsort(part) for part in project_asymmetric(q, k, draws))
    queries, keys, values = (
        gather(x[None], orders, axis=-2).reshape(-1, cluster_size, x.shape[-1])
        for x, orders in ((q, q_orders), (k, k_orders), (v, k_orders))
    )
    wide = accumulator(q.dtype)
    scores = jnp.einsum("cid,cjd->cij", queries, keys, preferred_element_type=wide)
    scores = scores * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    attended = jnp.einsum("cij,cjd->cid", weights, values, preferred_element_type=wide)
    q_places = inverse(q_orders)
    caught = jax.nn.logsumexp(scores, axis=-1).reshape(*shape, 1)
    shares = jax.nn.softmax(gather(caught, q_places, axis=-2), axis=0)
    out = (shares * gather(attended.reshape(*shape, -1), q_places, axis=-2)).sum(0)
    return out.swapaxes(1, 2).astype(q.dtype)
