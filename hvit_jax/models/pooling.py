"""What a model makes of its final tokens: one feature, that a head reads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.block import LayerNorm
from hvit_jax.ops.activations import ACTIVATIONS
from hvit_jax.ops.attention import attend
from hvit_jax.ops.precision import accumulator

Sizes = Float[Array, "B P"] | None


def mean_of_patches(patches: Float[Array, "B P C"], sizes: Sizes) -> Float[Array, "B C"]:
    """Average patch tokens, each as often as its size says; None: once each."""
    if sizes is None:
        return patches.mean(1)
    weights = sizes.astype(patches.dtype) / sizes.sum(1, keepdims=True).astype(patches.dtype)
    return (patches * weights[..., None]).sum(1)


class AttentionPool(nnx.Module):
    """One learned query that attends to the tokens, then an MLP.

    Zhai et al. 2022, "Scaling Vision Transformers", arXiv 2106.04560, call it MAP.
    """

    def __init__(self, config: ViTConfig, *, compute: Compute, rngs: nnx.Rngs):
        """Create the parameters.

        Args:
            config: the model's sizes.
            compute: in which types; its LayerNorm is stored in float32.
            rngs: draws the initial weights.
        """
        dtype, stored = compute.types
        width, hidden = config.width, config.pool_mlp_width or config.mlp_width

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=stored, rngs=rngs)

        self.heads = config.pool_heads or config.heads
        self.activation = config.activation
        self.probe = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,), stored))
        self.in_proj = linear(width, 3 * width)
        self.out_proj = linear(width, width)
        self.ln = LayerNorm(width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.linear_1 = linear(width, hidden)
        self.linear_2 = linear(hidden, width)

    def __call__(self, x: Float[Array, "B N C"], sizes: Sizes) -> Float[Array, "B C"]:
        """Pool tokens.

        Args:
            x: tokens.
            sizes: how often each counts; 0 hides it. None: once each.
        """
        batch, width = x.shape[0], x.shape[-1]
        queries, others = jnp.split(self.in_proj.kernel[...].astype(x.dtype), [width], axis=1)
        assert self.in_proj.bias is not None
        bias = self.in_proj.bias[...].astype(x.dtype)
        q = self.probe[...].astype(x.dtype) @ queries + bias[:width]
        k, v = jnp.split(x @ others + bias[width:].reshape(1, 1, -1), 2, axis=-1)
        q, k, v = (
            part.reshape(batch, -1, self.heads, width // self.heads)
            for part in (jnp.broadcast_to(q, (batch, 1, width)), k, v)
        )
        weights = None if sizes is None else jnp.log(sizes.astype(accumulator(x.dtype)))
        pooled = attend(q, k, v, key_bias=weights, implementation="xla").reshape(batch, width)
        pooled = self.out_proj(pooled)
        hidden = ACTIVATIONS[self.activation](self.linear_1(self.ln(pooled)))
        return pooled + self.linear_2(hidden)
