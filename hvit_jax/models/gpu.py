"""Layouts in which a block is fast on a GPU; what it computes stays the same.

Measured on an H200; docs/performance.md tells how.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import pad_end
from hvit_jax.ops.platform import backend

# Rows of tokens from which three products are faster than one whose result is cut.
_SEPARATE_ROWS = 4096


def as_rows(x: Float[Array, "B N C"]) -> Float[Array, "*rows C"]:
    """Put a batch's tokens in one list, on a GPU.

    XLA normalises the rows of a matrix nearly twice as fast as those of a batch of matrices.
    """
    return x.reshape(-1, x.shape[-1]) if backend() == "gpu" else x


def choose_gelu(requested: str, dtype: jax.typing.DTypeLike) -> str:
    """Name the GELU that will run: "exact" or "tanh".

    On a GPU cuBLAS computes the tanh form inside the product before it; the exact one is a pass of
    its own. Beside the rounding of 16 bits the difference is small; docs/performance.md has it.

    Args:
        requested: "auto" takes tanh on a GPU in 16 bits; the other two force one.
        dtype: what blocks are computed in.
    """
    if requested != "auto":
        return requested
    return "tanh" if backend() == "gpu" and jnp.dtype(dtype).itemsize == 2 else "exact"


def project_to_thirds(project: nnx.Linear, x: Float[Array, "*rows C"]) -> list[Array]:
    """Apply a linear layer, and cut its outputs in three.

    On a GPU in three products, except for few rows: cutting the result of one copies it.

    Args:
        project: a layer of 3 E outputs.
        x: tokens.

    Returns:
        Three arrays (*rows, E).
    """
    rows = math.prod(x.shape[:-1])
    if backend() != "gpu" or (isinstance(rows, int) and rows < _SEPARATE_ROWS):
        return jnp.split(project(x), 3, axis=-1)
    kernel, bias = project.kernel[...], project.bias
    assert bias is not None, "nnx.Linear has a bias unless it is told otherwise"
    cut = zip(jnp.split(kernel, 3, axis=1), jnp.split(bias[...], 3), strict=True)
    # XLA joins products up to 32 MB, unless they seem to have different operands.
    return [
        x @ kernel.astype(x.dtype) + bias.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)
        for x, (kernel, bias) in zip(jax.lax.optimization_barrier((x,) * 3), cut, strict=True)
    ]


def pad_tokens(x: Float[Array, "B N C"]) -> tuple[Float[Array, "B M C"], Int[Array, " B"] | None]:
    """Append tokens until a batch's rows can be divided by eight, on a GPU.

    cuBLAS is fast on rows by the eight: else XLA fills up and cuts every single product.

    Args:
        x: tokens.

    Returns:
        The tokens, and how many of them are real, the first ones; None if nothing was appended.
    """
    batch, tokens, _ = x.shape
    if backend() != "gpu" or not isinstance(batch, int) or batch * tokens % 8 == 0:
        return x, None
    return pad_end(x, -tokens % 8, axis=1), jnp.full(batch, tokens, jnp.int32)
