"""What many operations are made of: gathers, padding, softmax and LayerNorm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hvit_jax.ops.platform import one_operation
from hvit_jax.ops.precision import accumulator

Anywhere = Array | np.ndarray  # On the device while it runs, on the host afterwards.


def gather(x: Array, index: Array, *, axis: int = 1) -> Array:
    """Take entries along an axis, by default the tokens of a batch.

    Args:
        x: an array such as (B, N, ...).
        index: which entries, all of them in range: an array such as (B, K). Axes of `x` that it
            does not have, the last ones, are taken whole.
        axis: of `x`.

    Returns:
        The entries, such as (B, K, ...).
    """
    index = jnp.expand_dims(index, range(index.ndim, x.ndim))
    return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")


def pad_end(x: Array, count: int, *, axis: int, **options: Any) -> Array:
    """Append entries to an axis: zeros, or what the options of `jnp.pad` say."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths, **options)


@one_operation
def softmax(x: Float[Array, "*rows N"]) -> Float[Array, "*rows N"]:
    """Scale the exponentials of each row to a sum of 1."""
    return jax.nn.softmax(x, axis=-1)


@one_operation
def layer_norm(
    x: Float[Array, "*rows C"], scale: Float[Array, " C"], bias: Float[Array, " C"], *, epsilon
) -> Float[Array, "*rows C"]:
    """Normalise each row (Ba et al. 2016), in float32 at least."""
    dtype = accumulator(x.dtype)
    wide = x.astype(dtype)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    # Converted a second time: in 16 bits, the gradients of both are rounded.
    centred = x.astype(dtype) - mean
    row = (1,) * (x.ndim - 1) + (-1,)
    scale, bias = (parameter.astype(dtype).reshape(row) for parameter in (scale, bias))
    factor = jax.lax.rsqrt(variance + epsilon) * scale
    return (centred * factor + bias).astype(x.dtype)


def stable_exp(
    scores: Float[Array, "*rows N"], peak: Float[Array, "*rows 1"] | None = None
) -> Float[Array, "*rows N"]:
    """Compute a softmax's weights before they are normalised, such that none overflows.

    Args:
        scores: the scores; -inf gives 0.
        peak: what is subtracted from each row, by default its largest score. It cancels when the
            weights are normalised, so no gradient flows into it.

    Returns:
        `exp(scores - peak)`.
    """
    peak = scores.max(-1, keepdims=True) if peak is None else peak
    return jnp.exp(scores - jax.lax.stop_gradient(peak))


def largest_divisor(count: int, most: int) -> int:
    """Find the largest divisor of a count that is at most a limit, or else 1."""
    return max(size for size in range(1, max(1, min(count, most)) + 1) if count % size == 0)
