"""Attention for the runtimes that read ONNX: all heads at once, around one softmax."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import softmax
from hvit_jax.ops.attention.xla import count_meetings, scores


def attend(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend; see `hvit_jax.ops.attention.attend`. A key bias of h = 1 is that of all heads."""
    return _weigh(softmax(scores(q, k, key_bias, key_lengths)), v)


def attend_and_score(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and average the weights; see `hvit_jax.ops.attention.attend_and_score`."""
    weights = softmax(scores(q, k, key_bias))
    return _weigh(weights, v), weights.mean(2).mean(1)


def attend_in_clusters(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
) -> Float[Array, "B Nq H D"]:
    """Attend inside clusters; see `hvit_jax.ops.attention.attend_in_clusters`."""
    meetings = count_meetings(q_clusters, k_clusters).astype(q.dtype)
    return _weigh(softmax(scores(q, k) + jnp.log(meetings)), v)


def _weigh(weights, v):
    # By `einsum` the weights would be turned, which are many more than the values.
    return jnp.matmul(weights, v.swapaxes(1, 2)).swapaxes(1, 2)
