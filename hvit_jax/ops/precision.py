"""In which types products and sums are computed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hvit_jax.ops.platform import backend


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Name the type for sums, softmax and hashes of numbers in `dtype`: float32 at least."""
    wide = jnp.dtype(jnp.float32)
    return jnp.dtype(dtype) if jnp.dtype(dtype).itemsize > wide.itemsize else wide


def accurate_einsum(subscripts: str, *operands: Array | np.ndarray) -> Array:
    """Multiply in the operands' own precision (no TF32), accumulate in float32 at least."""
    wide = accumulator(jnp.result_type(*operands))
    if backend() == "cpu":  # XLA has no products of 16 bits with sums of 32 there for some shapes.
        operands = tuple(operand.astype(wide) for operand in operands)
    exact = all(operand.dtype == wide for operand in operands)
    precision = jax.lax.Precision.HIGHEST if exact else None
    return jnp.einsum(subscripts, *operands, precision=precision, preferred_element_type=wide)


def rounded(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    """Round numbers as a narrower type holds them, and keep their own.

    XLA leaves out a conversion to the type and back.
    """
    if x.dtype == dtype:
        return x
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


def warn_if_slow(dtype: str, say: Callable[[str], object]) -> None:
    """Say in one line if a type of 16 or 8 bits is asked for on a CPU, where none is fast."""
    if backend() == "cpu" and dtype in ("bfloat16", "float8"):
        say(f"{dtype} is slower than float32 on a CPU")


def smallest_integer(most: int) -> np.dtype:
    """Name the narrowest signed type up to `most`: comparing and counting bytes is fastest.

    Not all runtimes of ONNX can.
    """
    if backend() == "onnx":
        return np.dtype(np.int32)
    return np.min_scalar_type(-most - 1)  # A byte reaches from -128 to 127.
