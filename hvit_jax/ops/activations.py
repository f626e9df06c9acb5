"""The activations of MLPs."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from hvit_jax.ops.platform import one_operation
from hvit_jax.ops.precision import accumulator


@one_operation
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute the exact GELU, `x / 2 * (1 + erf(x / sqrt 2))` (Hendrycks & Gimpel 2016).

    In float32 at least. `jax.nn.gelu` takes erfc, two and a half times as long on a CPU.
    """
    wide = x.astype(accumulator(x.dtype))
    return (wide / 2 * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


@one_operation
def tanh_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute GELU's approximation by tanh, at most 4.7e-4 off (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute GELU's approximation `x sigmoid(1.702 x)`, as OpenAI's CLIP does."""
    wide = x.astype(accumulator(x.dtype))
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def silu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute `x sigmoid(x)`, of which SwiGLU makes its gates (Shazeer 2020, arXiv 2002.05202)."""
    wide = x.astype(accumulator(x.dtype))
    return (wide * jax.nn.sigmoid(wide)).astype(x.dtype)


# By the names of `ViTConfig.activation`.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": tanh_gelu,
    "quick_gelu": quick_gelu,
    "silu": silu,
}
