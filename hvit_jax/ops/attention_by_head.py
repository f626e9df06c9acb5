"""Attention head by head: only the scores of a few heads exist at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator

# Scores held at once: 4 MB in float32 stay in a CPU's cache; a GPU needs more to keep busy.
_CPU_SCORES, _GPU_SCORES = 2**20, 2**24


def attention_by_head(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and average the weights over heads and queries, in one pass.

    Args:
        q: queries.
        k: keys.
        v: values.
        key_bias: added to the scores of every key, in each head or (h = 1) in all; -inf masks one.

    Returns:
        Attended values in the dtype of `q`, and each key's mean weight in float32.
    """

    def attend(q, k, v, bias):
        weights, inverse = _weights(q, k, bias)
        out = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=accumulator(v.dtype))
        return (out * inverse[:, None]).astype(q.dtype), _column_mean(weights, inverse)

    heads = (x.swapaxes(1, 2) for x in (q, k, v))
    if key_bias is not None:
        key_bias = jnp.broadcast_to(key_bias, (q.shape[0], q.shape[2], k.shape[1]))
    out, columns = map_heads(attend, *heads, key_bias)
    return out.swapaxes(1, 2), columns.mean(1)


def column_mean_by_head(
    q: Float[Array, "B Nq H D"], k: Float[Array, "B Nk H D"]
) -> Float[Array, "B Nk"]:
    """Average attention weights over heads and queries.

    Args:
        q: queries.
        k: keys.

    Returns:
        Each key's mean weight in float32.
    """

    def average(q, k):
        return _column_mean(*_weights(q, k, None))

    return map_heads(average, q.swapaxes(1, 2), k.swapaxes(1, 2)).mean(1)


def _weights(q, k, bias):
    """Compute one head's weights before normalisation, and the factor that normalises a row."""
    scores = jnp.matmul(q, k.T, preferred_element_type=accumulator(q.dtype)) * q.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return weights, 1 / weights.sum(-1)


def _column_mean(weights, inverse):
    return jnp.matmul(inverse, weights, precision=jax.lax.Precision.HIGHEST) / len(weights)


def map_heads(
    function: Callable[..., Any],
    q: Float[Array, "B H Nq D"],
    k: Float[Array, "B H Nk D"],
    *more: Array | None,
) -> Any:
    """Run a function of one head's arrays over all heads of all images, a few at a time.

    Args:
        function: takes the arrays of one head, (Nq, D), (Nk, D) and so on.
        q: queries; with the keys they tell how many scores a head has.
        k: keys.
        *more: further arrays that lead with (B, H), or None, which is passed on.

    Returns:
        What the function returns, led by (B, H).
    """
    batch, heads = q.shape[:2]
    rows = jax.tree.map(lambda x: x.reshape(batch * heads, *x.shape[2:]), (q, k, *more))
    # The backward pass computes scores again, instead of keeping those of all heads.
    body = jax.checkpoint(lambda rows: function(*rows), prevent_cse=False)
    # A batch of unknown size, as in an exported model, is known to hold whole images only.
    count = batch * heads if isinstance(batch, int) else heads
    limit = _CPU_SCORES if backend() == "cpu" else _GPU_SCORES
    # A divisor, so that all steps are alike.
    group = largest_divisor(count, limit // (q.shape[2] * k.shape[2]))
    mapped = jax.lax.map(body, rows, batch_size=group)
    return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[1:]), mapped)


def largest_divisor(count: int, most: int) -> int:
    """Find the largest divisor of a count that is at most a limit, or else 1."""
    return max(size for size in range(1, max(1, min(count, most)) + 1) if count % size == 0)
