"""Attention inside clusters of sorted queries and keys, SMYRF (Daras et al. 2020)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.attention_by_head import largest_divisor, map_heads
from hvit_jax.ops.fused_attention import (
    MASKED,
    choose_implementation,
    fused_attention_with_bias,
)
from hvit_jax.ops.hashing import ProjectionDraws, project_asymmetric
from hvit_jax.ops.precision import accumulator
from hvit_jax.ops.sorting import argsort, inverse, ranks

# Numbers in a bias of cuDNN's attention at once, 256 MB.
_GPU_PAIRS = 2**27


def clustered_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    draws: ProjectionDraws,
    *,
    q_cluster_size: int,
    k_cluster_size: int,
    implementation: str = "xla",
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
        implementation: as for `attention`. In cuDNN logarithms of the counts are rounded to the
            dtype of `q`, which in bfloat16 changes weights by up to 0.8 %.

    Returns:
        Attended values in the dtype of `q`. Beside a few numbers a token and head, its projections,
        rank and cluster, memory does not grow with the rounds.

    Raises:
        InputError: if queries and keys give different numbers of clusters, or as for `attention`.

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
    projections = project_asymmetric(q.swapaxes(1, 2), k.swapaxes(1, 2), draws)
    q_clusters, k_clusters = (
        jnp.moveaxis(ranks(projected) // length, 0, 2).astype(_smallest_integer(clusters - 1))
        for projected, length in zip(projections, (q_cluster_size, k_cluster_size), strict=True)
    )
    attend = _attend_by_head
    if choose_implementation(implementation, q.dtype, q.shape[-1]) == "cudnn":
        attend = _attend_by_image
    return attend(q, k, v, q_clusters, k_clusters)


@jax.custom_vjp
def _attend_by_image(q, k, v, q_clusters, k_clusters) -> Float[Array, "B N H D"]:
    """Attend in cuDNN, a few images at a time: the counts of their pairs exist as a bias."""

    def attend(images):
        q, k, v, q_clusters, k_clusters = images
        counts = _meetings(q_clusters, k_clusters).astype(jnp.float32)
        bias = jnp.where(counts > 0, jnp.log(counts), MASKED)
        return fused_attention_with_bias(q, k, v, bias.astype(q.dtype))

    batch, size, heads, _ = q.shape
    most = _GPU_PAIRS // (heads * size**2)
    group = largest_divisor(batch, most) if isinstance(batch, int) else 1
    groups = jax.tree.map(
        lambda x: x.reshape(-1, group, *x.shape[1:]), (q, k, v, q_clusters, k_clusters)
    )
    return jax.lax.map(attend, groups).reshape(q.shape)


def _attend_by_image_forward(*inputs):
    return _attend_by_image(*inputs), inputs


def _attend_by_image_backward(inputs, gradient):
    """Differentiate the same figures computed head by head: no gradient needs the bias then."""
    q, k, v, q_clusters, k_clusters = inputs
    pull = jax.vjp(lambda q, k, v: _attend_by_head(q, k, v, q_clusters, k_clusters), q, k, v)[1]
    return *pull(gradient), None, None


_attend_by_image.defvjp(_attend_by_image_forward, _attend_by_image_backward)


def _attend_by_head(q, k, v, q_clusters, k_clusters) -> Float[Array, "B N H D"]:
    heads = (x.swapaxes(1, 2) for x in (q, k, v))
    return map_heads(_attend_in_clusters, *heads, q_clusters, k_clusters).swapaxes(1, 2)


def _attend_in_clusters(q, k, v, q_clusters, k_clusters) -> Float[Array, "N D"]:
    """Attend in one head, where a pair counts once for every round in which its clusters meet."""
    wide, meetings = accumulator(q.dtype), _meetings(q_clusters, k_clusters)
    scores = jnp.matmul(q, k.T, preferred_element_type=wide) * q.shape[-1] ** -0.5
    scores = jnp.where(meetings > 0, scores, -jnp.inf)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))) * meetings
    out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=wide)
    return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)


def _meetings(q_clusters: Int[Array, "*heads R N"], k_clusters: Int[Array, "*heads R N"]):
    """Count for every query and key the rounds in which their clusters meet."""
    rounds = q_clusters.shape[-2]
    narrow = _smallest_integer(rounds)
    meetings = jnp.zeros((), narrow)
    for index in range(rounds):
        meet = q_clusters[..., index, :, None] == k_clusters[..., index, None, :]
        meetings = meetings + meet.astype(narrow)
    return meetings


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
        _rows(x[None], orders).reshape(-1, cluster_size, x.shape[-1])
        for x, orders in ((q, q_orders), (k, k_orders), (v, k_orders))
    )
    wide = accumulator(q.dtype)
    scores = jnp.einsum("cid,cjd->cij", queries, keys, preferred_element_type=wide)
    scores = scores * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    attended = jnp.einsum("cij,cjd->cid", weights, values, preferred_element_type=wide)
    q_places = inverse(q_orders)
    caught = jax.nn.logsumexp(scores, axis=-1).reshape(*shape, 1)
    shares = jax.nn.softmax(_rows(caught, q_places), axis=0)
    out = (shares * _rows(attended.reshape(*shape, -1), q_places)).sum(0)
    return out.swapaxes(1, 2).astype(q.dtype)


def _smallest_integer(most: int) -> np.dtype:
    """Name the narrowest signed type up to `most`: comparing and counting bytes is fastest."""
    return np.min_scalar_type(-most - 1)  # A byte reaches from -128 to 127.


def _rows(x, order):
    return jnp.take_along_axis(x, order[..., None], axis=-2, mode="promise_in_bounds")
