"""Layouts in which a block is fast on a GPU; what it computes stays the same.

Measured on an H200; docs/performance.md tells how.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvit_jax.models.float8 import Float8Linear
from hvit_jax.ops.arrays import pad_end
from hvit_jax.ops.platform import backend

# Rows of tokens from which three products are faster than one whose result is cut.
_SEPARATE_ROWS = 4096


def as_rows(x: Float[Array, "B N C"]) -> Float[Array, "*rows C"]:
    """Put a batch's tokens in one list, on a GPU and in ONNX.

    XLA normalises the rows of a matrix nearly twice as fast as those of a batch of matrices. ONNX
    Runtime adds a bias inside the product of a matrix only.
    """
    return x.reshape(-1, x.shape[-1]) if backend() in ("gpu", "onnx") else x


def rows_to_normalise(x: Float[Array, "B N C"]) -> Float[Array, "*rows C"]:
    """Put a batch's tokens in one list for a LayerNorm.

    Where XLA sees that they were a batch, a GPU rounds scale and bias in kernels of their own, and
    keeps and reads in float32 what was just rounded to 16 bits.
    """
    rows = as_rows(x)
    return jax.lax.optimization_barrier(rows) if backend() == "gpu" else rows


def choose_activation(activation: str, gelu: str, dtype: jax.typing.DTypeLike) -> str:
    """Name the activation that will run, of those in `hvit_jax.ops.activations`.

    On a GPU cuBLAS computes GELU's tanh form inside the product before it; the exact one is a pass
    of its own. Beside the rounding of 16 bits the difference is small; docs/performance.md has it.

    Args:
        activation: the model's own; only the exact GELU, "gelu", may be replaced.
        gelu: "auto" takes tanh on a GPU in 16 bits; "exact" and "tanh" force one.
        dtype: what blocks are computed in.
    """
    if activation != "gelu" or gelu == "exact":
        return activation
    fast = backend() == "gpu" and jnp.dtype(dtype).itemsize == 2
    return "gelu_tanh" if gelu == "tanh" or fast else "gelu"


def project_apart(
    project: nnx.Linear | Float8Linear,
    x: Float[Array, "*rows C"],
    thirds: tuple[int, ...] = (1, 1, 1),
) -> list[Array]:
    """Apply a linear layer, and give its outputs in arrays of one or more thirds.

    On a GPU, except for few rows, and in ONNX by a product for each: cutting what one gives copies
    it.

    Args:
        project: a layer of 3 E outputs.
        x: tokens.
        thirds: how many make each array, three in all.

    Returns:
        Arrays (*rows, E), or two or three times as wide.
    """
    if len(thirds) == 1:
        return [project(x)]
    rows = math.prod(x.shape[:-1])
    few = isinstance(rows, int) and rows < _SEPARATE_ROWS
    if backend() not in ("gpu", "onnx") or (backend() == "gpu" and few):
        return _split(project(x), thirds, axis=-1)
    if isinstance(project, Float8Linear):
        rounded, multiply = project.round(x), project.multiply
        # XLA takes none of these products for cuBLAS's of float8 if it sees the cut.
        kernels = jax.lax.optimization_barrier(_split(project.kernel[...], thirds, axis=0))
    else:
        rounded, multiply = x, jnp.matmul
        kernels = _split(project.kernel[...].astype(x.dtype), thirds, axis=1)
    # XLA joins products up to 32 MB, unless they seem to have different operands.
    apart = jax.lax.optimization_barrier((rounded,) * len(thirds))
    parts = [multiply(each, kernel) for each, kernel in zip(apart, kernels, strict=True)]
    if project.bias is None:
        return parts
    biases = _split(project.bias[...].astype(parts[0].dtype), thirds, axis=0)
    row = (1,) * (x.ndim - 1) + (-1,)
    return [part + bias.reshape(row) for part, bias in zip(parts, biases, strict=True)]


def _split(x: Array, thirds: tuple[int, ...], *, axis: int) -> list[Array]:
    width = x.shape[axis] // 3
    ends = itertools.accumulate(width * count for count in thirds)
    return jnp.split(x, list(ends)[:-1], axis=axis)


def pad_tokens(x: Float[Array, "B N C"], multiple: int) -> tuple[Float[Array, "B M C"], int | None]:
    """Append tokens until a batch's rows can be divided, on a GPU.

    cuBLAS is fast on rows by the eight, in float8 by the sixteen: else XLA fills up and cuts every
    single product.

    Args:
        x: tokens.
        multiple: what the rows are to be divided by, a power of two.

    Returns:
        The tokens, and how many of an image's are real, the first ones; None if nothing was
        appended.
    """
    batch, tokens, _ = x.shape
    if backend() != "gpu" or not isinstance(batch, int) or batch * tokens % multiple == 0:
        return x, None
    return pad_end(x, -tokens % multiple, axis=1), tokens
