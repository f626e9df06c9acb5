"""Which number format sums are kept in."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Name the format for sums, softmax and hashes of numbers in `dtype`: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)
