"""The one transformer block that every method runs, in parts it may call separately."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.float8 import Float8Linear
from hvit_jax.models.gpu import (
    as_rows,
    choose_activation,
    pad_tokens,
    project_apart,
    rows_to_normalise,
)
from hvit_jax.ops.activations import ACTIVATIONS
from hvit_jax.ops.arrays import layer_norm, pad_end
from hvit_jax.ops.attention import (
    Heads,
    KeyBias,
    array_of,
    attend,
    attend_and_score,
    attend_in_clusters,
    average_groups,
    choose_implementation,
    class_attention,
)
from hvit_jax.ops.float8 import FLOAT8
from hvit_jax.ops.grouping import Groups
from hvit_jax.ops.matching import Matching
from hvit_jax.ops.merging import KERNEL_CHANNELS, merge_and_normalise, merge_tokens
from hvit_jax.ops.precision import accumulator
from hvit_jax.ops.rotary import rotate


class LayerNorm(nnx.LayerNorm):
    """LayerNorm with statistics in float32 at least, from centred values."""

    def __init__(self, width: int, *, epsilon: float, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        """Create scale and bias, in float32.

        Args:
            width: channels.
            epsilon: added to the variance.
            dtype: the type of what is normalised.
            rngs: as for `Block`.
        """
        wide = accumulator(dtype)
        super().__init__(width, epsilon=epsilon, dtype=wide, use_fast_variance=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*rows C"], factor: Float[Array, " C"] | None = None
    ) -> Float[Array, "*rows C"]:
        """Normalise each row, as Flax's does, which mixes types: strict promotion forbids that.

        Args:
            x: rows.
            factor: powers of two that the results are multiplied by; None: by nothing.
        """
        return layer_norm(x, *self.parameters(x.dtype, factor), epsilon=self.epsilon)

    def parameters(
        self, dtype: jax.typing.DTypeLike, factor: Float[Array, " C"] | None = None
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Give scale and bias, rounded to the tokens' type, and multiplied by a factor."""
        assert self.scale is not None and self.bias is not None
        scale, bias = (parameter[...].astype(dtype) for parameter in (self.scale, self.bias))
        return (scale, bias) if factor is None else (scale * factor, bias * factor)


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

        def linear(
            inputs: int, outputs: int, use_bias: bool = True, one_factor: bool = False
        ) -> nnx.Linear | Float8Linear:
            if compute.float8:
                return Float8Linear(
                    inputs, outputs, use_bias=use_bias, one_factor=one_factor, dtype=dtype
                )
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=stored, rngs=rngs
            )

        def norm(width: int) -> LayerNorm:
            return LayerNorm(width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

        def scale() -> nnx.Param | None:
            ones = jnp.ones(config.width, stored)
            return nnx.Param(ones) if config.layer_scale else None

        width, hidden = config.width, config.mlp_width
        self.heads, self.head_dim = config.heads, config.head_dim
        self.dtype, self.implementation = dtype, compute.attention
        self.class_token, self.rope, self.gated = config.class_token, config.rope, config.gated
        self.activation, self.gelu = config.activation, compute.gelu
        self.ln_1 = norm(width)
        self.in_proj = linear(width, 3 * width, config.qkv_bias != "none")
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.out_proj = linear(width, width)
        self.ls_1 = scale()
        self.ln_2 = norm(width)
        self.linear_1 = linear(width, 2 * hidden if config.gated else hidden)
        self.mlp_ln = norm(hidden) if config.mlp_norm else None
        self.linear_2 = linear(hidden, width, one_factor=not config.gated and not config.mlp_norm)
        self.ls_2 = scale()

    def qkv(
        self,
        x: Float[Array, "B N C"],
        coordinates: Float[Array, "b P 2"] | None = None,
        *,
        apart: str = "",
    ) -> tuple[Heads, Heads, Heads]:
        """Normalise tokens and project them to queries, keys and values, (B, N, H, D) each.

        Args:
            x: tokens.
            coordinates: the patches' places, by which queries and keys are turned; None: not yet,
                or the model has no rotary positions.
            apart: "q" if the queries will be multiplied by other than keys, "qkv" if keys or values
                will too, or images have `key_lengths` of their own: as parts of one array they
                would be copied for that.
        """
        normed = self._normed(self.ln_1, x, self.in_proj)
        return self.project_qkv(normed, coordinates, apart=apart)

    def _normed(
        self, norm: LayerNorm, x: Float[Array, "B N C"], layer: nnx.Linear | Float8Linear
    ) -> Float[Array, "B N C"]:
        """Normalise tokens for a linear layer, in float8 as it rounds them."""
        rows = rows_to_normalise(x)
        if isinstance(layer, Float8Linear):
            return layer.round_normed(norm, rows).reshape(x.shape)
        return norm(rows).reshape(x.shape)

    def project_qkv(
        self,
        x: Float[Array, "B N C"],
        coordinates: Float[Array, "b P 2"] | None = None,
        *,
        apart: str = "",
    ) -> tuple[Heads, Heads, Heads]:
        """Project normalised tokens; see `qkv`."""
        thirds = self._thirds(apart)
        products = project_apart(self.in_proj, as_rows(x), thirds)
        q, k, v = (
            Heads(
                product.reshape(*x.shape[:2], count * self.heads, -1),
                place * self.heads,
                self.heads,
            )
            for product, count in zip(products, thirds, strict=True)
            for place in range(count)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = Heads.of(self.q_norm(q.array)), Heads.of(self.k_norm(k.array))
        return self.rotate(q, coordinates), self.rotate(k, coordinates), v

    def _thirds(self, apart: str) -> tuple[int, ...]:
        """Tell which of q, k and v come in one array: our kernel reads them there."""
        if self._chosen() != "hopper":
            return 1, 1, 1
        return {"": (3,), "q": (1, 2), "qkv": (1, 1, 1)}[apart]

    def _chosen(self) -> str:
        """Name the attention that will run."""
        return choose_implementation(self.implementation, self.dtype, self.head_dim)

    def values(self, x: Float[Array, "B N C"]) -> Float[Array, "B N H D"]:
        """Normalise tokens and project them to values alone; see `qkv`.

        Pictures show attention by the queries and keys that `qkv` gave last.
        """
        parts = project_apart(self.in_proj, self.ln_1(as_rows(x)))
        return parts[2].reshape(*x.shape[:2], self.heads, -1)

    def rotate(self, x: Heads, coordinates: Float[Array, "b P 2"] | None) -> Heads:
        """Turn queries or keys by the places of their patches, if the model does so."""
        if self.rope is None or coordinates is None:
            return x
        return Heads.of(rotate(x.array, coordinates, self.rope))

    def attend(
        self,
        q: Heads | Float[Array, "B Nq H D"],
        k: Heads | Float[Array, "B Nk H D"],
        v: Heads | Float[Array, "B Nk H D"],
        *,
        key_bias: KeyBias | None = None,
        key_lengths: Int[Array, " B"] | int | None = None,
        factor: Float[Array, " C"] | None = None,
    ) -> Float[Array, "B Nq H D"]:
        """Run the attention that the model was built with; see `ops.attention.attend`."""
        return attend(
            q,
            k,
            v,
            key_bias=key_bias,
            key_lengths=key_lengths,
            factor=factor,
            implementation=self.implementation,
        )

    def attend_and_project(
        self,
        q: Heads | Float[Array, "B Nq H D"],
        k: Heads | Float[Array, "B Nk H D"],
        v: Heads | Float[Array, "B Nk H D"],
        *,
        key_bias: KeyBias | None = None,
        key_lengths: Int[Array, " B"] | int | None = None,
    ) -> Float[Array, "B Nq C"]:
        """Attend, and project what comes of it: in float8 our kernel rounds it as it writes it."""
        factor = self._factor()
        return self.project(
            self.attend(q, k, v, key_bias=key_bias, key_lengths=key_lengths, factor=factor)
        )

    def _factor(self) -> Float[Array, " C"] | None:
        """Give what attended values are multiplied by for the projection in float8."""
        return self.out_proj.factor[...] if isinstance(self.out_proj, Float8Linear) else None

    def attend_and_score(
        self,
        q: Heads | Float[Array, "B Nq H D"],
        k: Heads | Float[Array, "B Nk H D"],
        v: Heads | Float[Array, "B Nk H D"],
        *,
        key_bias: KeyBias | None = None,
    ) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
        """Attend, and tell how much attention each key gets; see `ops.attention`."""
        return attend_and_score(q, k, v, key_bias=key_bias, implementation=self.implementation)

    def attend_and_score_patches(
        self,
        q: Heads | Float[Array, "B Nq H D"],
        k: Heads | Float[Array, "B Nk H D"],
        v: Heads | Float[Array, "B Nk H D"],
        *,
        prefix: int,
        key_bias: KeyBias | None = None,
    ) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B P"]]:
        """Attend for `project`, and tell how much attention each patch gets from CLS.

        Without CLS it is what it gets from all patches on average; both are means over heads.

        Args:
            q: queries.
            k: keys, of the same tokens.
            v: values.
            prefix: tokens before the patches.
            key_bias: as for `attend`.
        """
        if self.class_token:
            scores = class_attention(array_of(q), array_of(k), prefix=prefix, key_bias=key_bias)
            return self.attend(q, k, v, key_bias=key_bias, factor=self._factor()), scores
        if not prefix:
            return self.attend_and_score(q, k, v, key_bias=key_bias)
        rows = array_of(q)
        attended, columns = self.attend_and_score(rows[:, prefix:], k, v, key_bias=key_bias)
        first = self.attend(rows[:, :prefix], k, v, key_bias=key_bias)
        return jnp.concatenate([first, attended], axis=1), columns[:, prefix:]

    def attend_in_clusters(self, *arrays: Any, clusters: int) -> Float[Array, "B N H D"]:
        """Attend inside clusters of several rounds; see `ops.attention`."""
        return attend_in_clusters(*arrays, clusters=clusters, implementation=self.implementation)

    def average_groups(
        self, x: Heads | Float[Array, "B N H D"], groups: Groups
    ) -> Float[Array, "B K H D"]:
        """Average tokens over groups, each head its own; see `ops.attention`."""
        return average_groups(x, groups, implementation=self.implementation)

    def project(self, attended: Float[Array, "B N H D"]) -> Float[Array, "B N C"]:
        """Join the heads and project back to the residual stream."""
        return _scaled(self.out_proj(attended.reshape(*attended.shape[:2], -1)), self.ls_1)

    def mlp(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Compute the MLP branch, normalisation included, residual excluded."""
        return self.run_mlp(self._normed(self.ln_2, x, self.linear_1))

    def merge(
        self, x: Float[Array, "B N C"], sizes: Float[Array, "B N"], matching: Matching
    ) -> tuple[Float[Array, "B M C"], Float[Array, "B M"], Float[Array, "B M C"]]:
        """Merge matched tokens, and normalise them for the MLP.

        Args:
            x: tokens.
            sizes: input tokens that each of them stands for.
            matching: which of them merge.

        Returns:
            The merged tokens, their sizes, and what `run_mlp` takes.
        """
        if self._chosen() != "hopper" or x.shape[-1] % KERNEL_CHANNELS:
            merged, sizes = merge_tokens(x, sizes, matching)
            return merged, sizes, self._normed(self.ln_2, merged, self.linear_1)
        norm, layer, dtype = self.ln_2, self.linear_1, x.dtype
        assert norm.scale is not None and norm.bias is not None
        scale, bias = norm.scale[...], norm.bias[...]
        if isinstance(layer, Float8Linear):
            (scale, bias), dtype = norm.parameters(x.dtype, layer.factor[...]), FLOAT8
        return merge_and_normalise(
            x, sizes, matching, scale, bias, epsilon=norm.epsilon, dtype=dtype
        )

    def run_mlp(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        """Compute the MLP of normalised tokens."""
        hidden = self.linear_1(as_rows(x))
        hidden, up = jnp.split(hidden, 2, axis=-1) if self.gated else (hidden, None)
        hidden = ACTIVATIONS[choose_activation(self.activation, self.gelu, hidden.dtype)](hidden)
        hidden = hidden if up is None else hidden * up
        hidden = hidden if self.mlp_ln is None else self.mlp_ln(hidden)
        return _scaled(self.linear_2(hidden), self.ls_2).reshape(x.shape)

    def __call__(
        self, x: Float[Array, "B N C"], coordinates: Float[Array, "b P 2"] | None = None
    ) -> Float[Array, "B N C"]:
        """Run the block on all tokens, without reduction; arguments as for `qkv`."""
        tokens = x.shape[1]
        x, lengths = pad_tokens(x, 16 if isinstance(self.linear_1, Float8Linear) else 8)
        if coordinates is not None:
            coordinates = pad_end(coordinates, x.shape[1] - tokens, axis=1)
        x = x + self.attend_and_project(*self.qkv(x, coordinates), key_lengths=lengths)
        return (x + self.mlp(x))[:, :tokens]


def _scaled(x: Float[Array, "*rows C"], scale: nnx.Param | None) -> Float[Array, "*rows C"]:
    """Scale a branch by its vector, LayerScale (Touvron et al. 2021, arXiv 2103.17239)."""
    if scale is None:
        return x
    return x * scale[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def stack_blocks(
    counts: Sequence[int], config: ViTConfig, *, compute: Compute, rngs: nnx.Rngs
) -> list[Block]:
    """Make stacks of blocks, each with its parameters along a first axis, to be scanned over.

    Args:
        counts: how many blocks each stack has.
        config: the model's sizes.
        compute: as for `Block`.
        rngs: draws the initial weights, each block's own.
    """

    # All at once: flax takes long to make a stack, and some methods have one for every block.
    @nnx.split_rngs(splits=sum(counts))
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, compute=compute, rngs=rngs)

    graph, weights = nnx.split(create(rngs))
    ends = itertools.accumulate(counts)
    cuts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [nnx.merge(graph, jax.tree.map(itemgetter(cut), weights)) for cut in cuts]
