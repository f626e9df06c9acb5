"""Attention as XLA compiles it: a few heads at a time, so that few scores exist at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import largest_divisor, stable_exp
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator, smallest_integer

# Scores held at once: 4 MB in float32 stay in a CPU's cache; a GPU needs more to keep busy.
_CPU_SCORES, _GPU_SCORES = 2**20, 2**24


def attend(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend; see `hvit_jax.ops.attention.attend`. A key bias of h = 1 is that of all heads."""
    # By head is 2 to 3 times faster on two CPU cores from 577 tokens on, and no slower at 197.
    if backend() == "cpu":
        return attend_and_score(q, k, v, mask_keys(key_bias, key_lengths, k.shape[1]))[0]
    weights = stable_exp(scores(q, k, key_bias, key_lengths))
    # Dividing the product instead of the weights saves a pass over the N x N array.
    total = weights.sum(-1)
    out = jnp.einsum(
        "bhnm,bmhd->bnhd", weights.astype(v.dtype), v, preferred_element_type=accumulator(v.dtype)
    )
    return (out / total.swapaxes(1, 2)[..., None]).astype(q.dtype)


def scores(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B H Nq Nk"]:
    """Compute the scores of all heads, in float32, as arguments of a softmax over the keys."""
    products = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=accumulator(q.dtype))
    products = products * q.shape[-1] ** -0.5
    bias = mask_keys(key_bias, key_lengths, k.shape[1])
    return products if bias is None else products + bias[:, :, None, :]


def mask_keys(
    key_bias: Float[Array, "B h Nk"] | None, key_lengths: Int[Array, " B"] | None, keys: int
) -> Float[Array, "B h Nk"] | None:
    """Join the two ways to weigh keys: those beyond an image's length get -inf."""
    if key_lengths is None:
        return key_bias
    real = jnp.arange(keys)[None, None] < key_lengths[:, None, None]
    return jnp.where(real, 0.0 if key_bias is None else key_bias, -jnp.inf)


def attend_and_score(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    *,
    at_once: int | None = None,
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and average the weights over heads and queries, in one pass.

    See `hvit_jax.ops.attention.attend_and_score`. So many scores exist `at_once`, or those of one
    head if it has more; default: as many as suit the device.
    """

    def one_head(q, k, v, bias):
        weights, inverse = _weights(q, k, bias)
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=accumulator(v.dtype))
        return (out * inverse[:, None]).astype(q.dtype), _column_mean(weights, inverse)

    heads = (x.swapaxes(1, 2) for x in (q, k, v))
    out, columns = _map_heads(one_head, *heads, _of_every_head(key_bias, q, k), at_once=at_once)
    return out.swapaxes(1, 2), columns.mean(1)


def column_mean(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
) -> Float[Array, "B Nk"]:
    """Average attention weights over heads and queries, in float32."""

    def one_head(q, k, bias):
        return _column_mean(*_weights(q, k, bias))

    bias = _of_every_head(key_bias, q, k)
    return _map_heads(one_head, q.swapaxes(1, 2), k.swapaxes(1, 2), bias).mean(1)


def _of_every_head(key_bias, q, k) -> Float[Array, "B H Nk"] | None:
    if key_bias is None:
        return None
    return jnp.broadcast_to(key_bias, (q.shape[0], q.shape[2], k.shape[1]))


def _weights(q, k, bias):
    """Compute one head's weights before normalisation, and the factor that normalises a row."""
    products = _scores(q, k)
    weights = stable_exp(products if bias is None else products + bias[None])
    return weights, 1 / weights.sum(-1)


def _scores(q: Float[Array, "Nq D"], k: Float[Array, "Nk D"]) -> Float[Array, "Nq Nk"]:
    return jnp.matmul(q, k.T, preferred_element_type=accumulator(q.dtype)) * q.shape[-1] ** -0.5


def _column_mean(weights, inverse):
    return jnp.matmul(inverse, weights, precision=jax.lax.Precision.HIGHEST) / len(weights)


def attend_in_clusters(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
) -> Float[Array, "B Nq H D"]:
    """Attend inside clusters; see `hvit_jax.ops.attention.attend_in_clusters`."""

    def one_head(q, k, v, q_clusters, k_clusters):
        meetings = count_meetings(q_clusters, k_clusters)
        scores = jnp.where(meetings > 0, _scores(q, k), -jnp.inf)
        weights = stable_exp(scores) * meetings.astype(scores.dtype)
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=accumulator(q.dtype))
        return (out / weights.sum(-1, keepdims=True)).astype(q.dtype)

    heads = (x.swapaxes(1, 2) for x in (q, k, v))
    return _map_heads(one_head, *heads, q_clusters, k_clusters).swapaxes(1, 2)


def count_meetings(
    q_clusters: Int[Array, "*heads R Nq"], k_clusters: Int[Array, "*heads R Nk"]
) -> Int[Array, "*heads Nq Nk"]:
    """Count for every query and key the rounds in which their clusters meet."""
    rounds = q_clusters.shape[-2]
    narrow = smallest_integer(rounds)
    meetings = jnp.zeros((), narrow)
    for index in range(rounds):
        meet = q_clusters[..., index, :, None] == k_clusters[..., index, None, :]
        meetings = meetings + meet.astype(narrow)
    return meetings


def _map_heads(
    function: Callable[..., Any],
    q: Float[Array, "B H Nq D"],
    k: Float[Array, "B H Nk D"],
    *more: Array | None,
    at_once: int | None = None,
) -> Any:
    """Run a function of one head's arrays over all heads of all images, a few at a time.

    Args:
        function: takes the arrays of one head, (Nq, D), (Nk, D) and so on.
        q: queries; with the keys they tell how many scores a head has.
        k: keys.
        *more: further arrays that lead with (B, H), or None, which is passed on.
        at_once: how many scores may exist; default: as many as suit the device.

    Returns:
        What the function returns, led by (B, H).
    """
    batch, heads = q.shape[:2]
    rows = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), (q, k, *more))
    # The backward pass computes scores again, instead of storing those of all heads.
    body = jax.checkpoint(lambda rows: function(*rows), prevent_cse=False)
    # A batch of unknown size, as in an exported model, is known to hold whole images only.
    count = batch * heads if isinstance(batch, int) else heads
    at_once = at_once or (_CPU_SCORES if backend() == "cpu" else _GPU_SCORES)
    # A divisor, so that all steps are alike.
    group = largest_divisor(count, at_once // (q.shape[2] * k.shape[2]))
    mapped = jax.lax.map(body, rows, batch_size=group)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), mapped)
