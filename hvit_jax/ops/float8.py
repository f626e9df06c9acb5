"""Products of 8-bit floating-point numbers: e4m3 (Micikevicius et al. 2022, arXiv 2209.05433).

Numbers are divided by a power of two before they are rounded, and products multiplied by it: that
is exact, so that rounding is all that is lost. e4m3 keeps four significant bits of what lies
between 448 and 2^-6, and has steps of 2^-9 below.
"""

from __future__ import annotations

from typing import NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.errors import InputError
from hvit_jax.ops.platform import backend, is_exported

FLOAT8 = jnp.float8_e4m3fn
LARGEST = 448.0


def check_device() -> None:
    """Refuse a GPU that has no products of float8.

    Raises:
        InputError: if programs are for this machine's GPU, and it has none.
    """
    if backend() == "gpu" and not is_exported():
        check_capability(str(getattr(jax.devices()[0], "compute_capability", "unknown")))


def check_capability(capability: str) -> None:
    """Refuse a GPU by its CUDA compute capability, such as "8.0".

    Raises:
        InputError: if it is below 8.9, or not NVIDIA's.
    """
    version = tuple(int(part) if part.isdecimal() else 0 for part in capability.split("."))
    if version < (8, 9):
        raise InputError(
            "dtype 'float8' needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper), "
            f"this one has {capability}; use 'bfloat16'"
        )


def powers_of_two(limits: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Find powers of two, by which numbers up to these limits are divided to fit into e4m3."""
    return jnp.ldexp(jnp.ones_like(limits), jnp.frexp(limits / LARGEST)[1])


@jax.custom_jvp
def to_float8(
    x: Float[Array, "*shape"], factor: Float[Array, "*factors"]
) -> Float[Array, "*shape"]:
    """Multiply, and round to the nearest number of e4m3; what is too large becomes the largest.

    Args:
        x: numbers.
        factor: what they are multiplied by, of the same type and as many axes, or a single number.

    Raises:
        InputError: where a gradient is wanted, which would be rounded to nothing.
    """
    largest = jnp.asarray(LARGEST, x.dtype)
    # XLA lets cuBLAS round inside the product before, if it finds exactly this.
    return jax.lax.clamp(-largest, x * factor, largest).astype(FLOAT8)


@to_float8.defjvp
def refuse_gradient(*arguments) -> NoReturn:
    """Refuse to differentiate what rounds to float8; a rule for `jax.custom_jvp`.

    Raises:
        InputError: always.
    """
    raise InputError("dtype 'float8' gives no gradients; use 'bfloat16'")


def product(
    x: Float[Array, "*rows C"],
    kernel: Float[Array, "E C"],
    scale: Float[Array, ""],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "*rows E"]:
    """Multiply rows by a transposed matrix; sums are in float32.

    Args:
        x: numbers in e4m3.
        kernel: the matrix, in e4m3.
        scale: what the product is multiplied by, a power of two.
        dtype: the type of the result.
    """
    across = (((x.ndim - 1,), (1,)), ((), ()))
    if backend() == "cpu":
        wide = jnp.float32
        sums = jax.lax.dot_general(x.astype(wide), kernel.astype(wide), across)
        return (sums * scale).astype(dtype)
    # What XLA takes for cuBLAS's product of float8: its operands widened, and one scaled.
    return jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype) * scale.astype(dtype), across)
