"""The one transformer block that every method runs, in parts it may call separately."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.gpu import as_rows, choose_gelu, pad_tokens, project_to_thirds
from hvit_jax.ops.attention import (
    KeyBias,
    attend,
    attend_and_score,
    attend_in_clusters,
    average_groups,
)
from hvit_jax.ops.grouping import Groups
from hvit_jax.ops.platform import one_operation
from hvit_jax.ops.precision import accumulator


class LayerNorm(nnx.LayerNorm):
    """SWAG's LayerNorm: eps 1e-6, statistics in float32 at least, from centred values."""

    def __init__(self, width: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        """Create scale and bias, in float32.

        Args:
            width: channels.
            dtype: the type of what is normalised.
            rngs: as for `Block`.
        """
        wide = accumulator(dtype)
        super().__init__(width, epsilon=1e-6, dtype=wide, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
        """Normalise each row, as Flax's does, which mixes types: strict promotion forbids that."""
        assert self.scale is not None and self.bias is not None
        # Both are rounded to the tokens' type.
        scale, bias = (parameter[...].astype(x.dtype) for parameter in (self.scale, self.bias))
        return layer_norm(x, scale, bias, epsilon=self.epsilon)


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


class Block(nnx.Module):
    """A pre-norm transformer block: `x += attention(ln_1(x))`, then `x += mlp(ln_2(x))`.

    A reduction method composes `qkv`, `attend`, `project` and `mlp`; calling the block runs it
    without reduction.
    """

    def __init__(self, config: ViTConfig, *, compute: Compute, rngs: nnx.Rngs):
        """Create the block's parameters.

        Args:
            config: the model's sizes.
            compute: in which types, and by which attention; LayerNorms are stored in float32.
            rngs: draws the initial weights.
        """
        dtype, stored = compute.types

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=stored, rngs=rngs)

        self.heads, self.implementation = config.heads, compute.attention
        self.gelu = compute.gelu
        self.ln_1 = LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.in_proj = linear(config.width, 3 * config.width)
        self.out_proj = linear(config.width, config.width)
        self.ln_2 = LayerNorm(config.width, dtype=dtype, rngs=rngs)
        self.linear_1 = linear(config.width, config.mlp_width)
        self.linear_2 = linear(config.mlp_width, config.width)

    def qkv(
        self, x: Float[Array, "B N C"]
    ) -> tuple[Float[Array, "B N H D"], Float[Array, "B N H D"], Float[Array, "B N H D"]]:
        """Normalise tokens and project them to queries, keys and values."""
        parts = project_to_thirds(self.in_proj, self.ln_1(as_rows(x)))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in parts)
        return q, k, v

    def attend(
        self,
        q: Float[Array, "B Nq H D"],
        k: Float[Array, "B Nk H D"],
        v: Float[Array, "B Nk H D"],
        *,
        key_bias: KeyBias | None = None,
        key_lengths: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B Nq H D"]:
        """Run the attention that the model was built with; see `ops.attention.attend`."""
        return attend(
            q, k, v, key_bias=key_bias, key_lengths=key_lengths, implementation=self.implementation
        )

    def attend_and_score(
        self, q: Float[Array, "B Nq H D"], k: Float[Array, "B Nk H D"], v: Float[Array, "B Nk H D"]
    ) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
        """Attend, and tell how much attention each key gets; see `ops.attention`."""
        return attend_and_score(q, k, v, implementation=self.implementation)

    def attend_in_clusters(self, *arrays: Array, clusters: int) -> Float[Array, "B N H D"]:
        """Attend inside clusters of several rounds; see `ops.attention`."""
        return attend_in_clusters(*arrays, clusters=clusters, implementation=self.implementation)

    def average_groups(self, x: Float[Array, "B N H D"], groups: Groups) -> Float[Array, "B K H D"]:
        """Average tokens over groups, each head its own; see `ops.attention`."""
        return average_groups(x, groups, implementation=self.implementation)

    def project(self, attended: Float[Array, "B N H D"]) -> Float[Array, "B N C"]:
        """Join the heads and project back to the residual stream."""
        return self.out_proj(attended.reshape(*attended.shape[:2], -1))

    def mlp(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Compute the MLP branch, normalisation included, residual excluded."""
        hidden = self.linear_1(self.ln_2(as_rows(x)))
        tanh = choose_gelu(self.gelu, hidden.dtype) == "tanh"
        return self.linear_2(tanh_gelu(hidden) if tanh else gelu(hidden)).reshape(x.shape)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Run the block on all tokens, without reduction."""
        tokens = x.shape[1]
        x, lengths = pad_tokens(x)
        x = x + self.project(self.attend(*self.qkv(x), key_lengths=lengths))
        return (x + self.mlp(x))[:, :tokens]


def stack_blocks(count: int, config: ViTConfig, *, compute: Compute, rngs: nnx.Rngs) -> Block:
    """Make several blocks whose parameters are stacked along a first axis, to be scanned over.

    Args:
        count: how many.
        config: the model's sizes.
        compute: as for `Block`.
        rngs: draws the initial weights, each block's own.
    """

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, compute=compute, rngs=rngs)

    return create(rngs)
