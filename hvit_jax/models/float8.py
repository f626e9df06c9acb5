"""Linear layers in float8: weights rounded once, inputs by scales that are known in advance.

What enters a block's linear layer cannot exceed a limit that follows from weights alone, since
LayerNorm gives rows of a known length, attention averages and activations shrink. An input is
divided by a power of two that its channel's limit gives. So nothing has to be measured while the
model runs, neither calibrated, nothing overflows, and an image's result does not depend on its
batch. The limits are wide, 32 standard deviations for 1,024 channels, but e4m3 has room: it keeps
its precision over 15 powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvit_jax.ops.float8 import FLOAT8, powers_of_two, product, to_float8

Tree = dict[str, Any]


class Float8Linear(nnx.Module):
    """A linear layer whose weights and inputs are in e4m3; bias and outputs are not.

    Attributes:
        kernel: (E, C), as cuBLAS reads it: transposed, rounded.
        scale: what the kernel was divided by.
        factor: what inputs are multiplied by, (C,), or () for all alike.
        bias: (E,), or None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        use_bias: bool = True,
        one_factor: bool = False,
        dtype: jax.typing.DTypeLike,
    ):
        """Make room for what `round_blocks` gives.

        Args:
            inputs: channels.
            outputs: channels.
            use_bias: whether there is a bias.
            one_factor: whether all inputs are multiplied by the same number.
            dtype: the type of inputs, bias and outputs.
        """
        self.kernel = nnx.Param(jnp.zeros((outputs, inputs), FLOAT8))
        self.scale = nnx.Param(jnp.ones((), jnp.float32))
        self.factor = nnx.Param(jnp.ones(() if one_factor else inputs, dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if use_bias else None

    def round(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        """Round inputs to e4m3, unless they are."""
        if x.dtype == FLOAT8:
            return x
        factor = self.factor[...]
        return to_float8(x, factor.reshape((1,) * (x.ndim - 1) + (-1,)) if factor.ndim else factor)

    def round_normed(
        self, norm: Callable[..., Float[Array, "*rows C"]], x: Float[Array, "*rows C"]
    ) -> Float[Array, "*rows C"]:
        """Normalise and round inputs: as `round` does, with less work for a GPU.

        The norm multiplies by the factor in its own scale and bias, and its results fit.
        """
        return norm(x, self.factor[...]).astype(FLOAT8)

    def multiply(
        self, rounded: Float[Array, "*rows C"], kernel: Float[Array, "e C"]
    ) -> Float[Array, "*rows e"]:
        """Multiply rounded inputs by some of the kernel's rows."""
        return product(rounded, kernel, self.scale[...], self.factor.dtype)

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows E"]:
        """Apply the layer."""
        out = self.multiply(self.round(x), self.kernel[...])
        if self.bias is None:
            return out
        return out + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


def round_blocks(blocks: Tree) -> Tree:
    """Round the linear layers of stacked blocks; see `hvit_jax.models.parameters` for their tree.

    Args:
        blocks: parameters of blocks, along a first axis.

    Returns:
        The same with those of `Float8Linear` for every linear layer.
    """
    values = _reach(blocks["ln_1"], blocks["in_proj"])
    hidden = _reach(blocks["ln_2"], blocks["linear_1"])
    outputs = blocks["linear_2"]["kernel"].shape[1]
    limits = {
        "in_proj": _limit(blocks["ln_1"]),
        "out_proj": values[:, -(values.shape[1] // 3) :],
        "linear_1": _limit(blocks["ln_2"]),
    }
    if "mlp_ln" in blocks:
        limits["linear_2"] = _limit(blocks["mlp_ln"])
    elif hidden.shape[1] == 2 * outputs:  # One half gates the other.
        limits["linear_2"] = hidden[:, :outputs] * hidden[:, outputs:]
    else:  # One factor for all: then cuBLAS rounds behind its GELU.
        limits["linear_2"] = hidden.max(1)
    return {**blocks, **{name: _round(blocks[name], limit) for name, limit in limits.items()}}


def _limit(norm: Tree) -> Float[Array, "L C"]:
    """Find what each channel of a LayerNorm's outputs cannot exceed."""
    scale, bias = (jnp.abs(jnp.asarray(norm[name])) for name in ("scale", "bias"))
    return scale.shape[1] ** 0.5 * scale + bias


def _reach(norm: Tree, linear: Tree) -> Float[Array, "L E"]:
    """Find what each output of a linear layer behind a LayerNorm cannot exceed.

    By Cauchy and Schwarz: before scale and bias, a row of LayerNorm's is sqrt(C) long at most.
    """
    kernel, scale, bias = (
        jnp.asarray(each) for each in (linear["kernel"], norm["scale"], norm["bias"])
    )
    length = jnp.sqrt(jnp.einsum("lc,lce->le", jnp.square(scale), jnp.square(kernel)))
    shift = jnp.einsum("lc,lce->le", bias, kernel) + linear.get("bias", 0)
    return scale.shape[1] ** 0.5 * length + jnp.abs(shift)


def _round(linear: Tree, limit: Float[Array, "L ..."]) -> Tree:
    """Round a layer, whose inputs have a limit each, or one together."""
    steps = powers_of_two(limit)
    kernel = jnp.asarray(linear["kernel"]) * steps.reshape(*steps.shape[:1], -1, 1)
    scale = powers_of_two(jnp.abs(kernel).max((1, 2)))
    rounded = to_float8(kernel, 1 / scale[:, None, None]).swapaxes(1, 2)
    return {**linear, "kernel": rounded, "scale": scale, "factor": 1 / steps}
