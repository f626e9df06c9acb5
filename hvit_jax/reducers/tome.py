"""ToMe: in every block, merge the pairs of tokens that are most alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState, initial_state, pool_by_size
from hvit_jax.ops import flops
from hvit_jax.ops.merging import (
    Matching,
    drop_tokens,
    match_tokens,
    merge_counts,
    merge_tokens,
    most_merges,
)
from hvit_jax.ops.precision import accumulator

PROPORTIONAL = "proportional attention"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MergeState(TokenState):
    """Trace of the patches, and how many input tokens each token stands for.

    Attributes:
        sizes: 1 for a token that never merged.
    """

    sizes: Float[Array, "B N"]


@dataclass(frozen=True)
class ToMe(Reducer):
    """Token merging.

    Bolya et al. 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461.

    Every block merges its `r` most redundant tokens into others, so that the sequence shrinks
    little by little and nothing is thrown away. Between attention and MLP the tokens are split in
    two by turns. Each one of the first half finds its most similar partner in the second, by the
    cosine of its attention keys averaged over the heads, and the `r` best pairs become their mean,
    weighted by how many input tokens each stands for. A merged token stands for several, so
    `proportional_attention` adds the logarithm of its size to its attention scores: it then draws
    as much attention as its parts did. CLS and registers never merge. At most half of the patch
    tokens merge in one block, whatever `r` asks for.

    `r` is a whole number for all blocks; a list with one number a block, padded with 0; or
    (r, inflection), a linear schedule of mean `r`: from 2r to 0 for an inflection of -1.0, from 0
    to 2r for 1.0. Two numbers are the latter exactly if the second is a float: (8, 1.0) is a
    schedule and (8, 1) a list, on the command line too (`--r 8,1.0` and `--r 8,1`).

    The default merges 47% of the patches over the depth: 20 a block for ViT-L/16 at 512 and for
    ViT-H/14 at 518, the middle rows of the published table.
    """

    name: ClassVar[str] = "tome"

    r: int | tuple[int, ...] | tuple[int, float] | None = option(
        None,
        "tokens merged a block: a number, a list with one a block, or a number and an inflection "
        "written with a point, such as 8,-0.5 (default: 47% of the patches over the depth)",
    )
    proportional_attention: bool = option(
        True, "weigh attention to a token by how many input tokens it stands for"
    )
    rope: str = option(
        "mean",
        "where a merged token stands in a model with rotary positions: at the mean of its patches, "
        "or where the token was that the others joined",
        choices=("mean", "destination"),
    )
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[ToMe]:
        """Vary how many tokens merge; see `Reducer.strengths`."""
        return (cls(r=count) for count in range(most_merges(config.num_patches, prefix=0) + 1))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[ToMe]:
        """Try to merge from a quarter to 85% of the patches; see `Reducer.candidates`."""
        even = config.num_patches / config.depth
        return (cls(r=max(1, round(f * even))) for f in (0.25, 0.4, 0.55, 0.7, 0.85))

    def resolve(self, config: ViTConfig) -> ToMe:
        """Fill in the default of `r`, and check it; see `Reducer.resolve`."""
        resolved = dataclasses.replace(self, r=self._r(config))
        resolved.schedule(config)
        return resolved

    def _r(self, config: ViTConfig) -> int | tuple[int, ...] | tuple[int, float]:
        if self.r is None:
            return max(1, round(0.47 * config.num_patches / config.depth))
        return self.r

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every block that merges."""
        layers, full, prefix = [], config.num_tokens, config.prefix_tokens
        tokens = full
        for count in merge_counts(self._r(config), config.depth):
            left = tokens - min(count, most_merges(tokens, prefix=prefix))
            mode = "merge" if left < tokens else "dense"
            # All sizes are 1 before the first merge, and their logarithms 0.
            if self.proportional_attention and tokens < full:
                mode = PROPORTIONAL
            layers.append(Layer(tokens, left, mode))
            tokens = left
        return tuple(layers)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> MergeState:
        """Make the state before the first block; see `Reducer.init`."""
        sizes = jnp.ones(x.shape[:2], accumulator(x.dtype))
        return MergeState(**initial_state(x, config, trace=trace), sizes=sizes)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: MergeState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run attention weighted by size, merge, then run the MLP; see `Reducer.block`."""
        q, k, v = block.qkv(x)
        metric = k.mean(2, dtype=accumulator(k.dtype))  # Of what tokens hold, not of their places.
        q, k = block.rotate(q, state.coordinates), block.rotate(k, state.coordinates)
        bias = jnp.log(state.sizes) if layer.mode == PROPORTIONAL else None
        x = x + block.project(block.attend(q, k, v, key_bias=bias))
        if layer.tokens_out < layer.tokens_in:
            x, state = self._merge(x, metric, state, r=layer.tokens_in - layer.tokens_out)
        return x + block.mlp(x), state

    def _merge(self, x, metric, state: MergeState, *, r: int) -> tuple[Array, MergeState]:
        matching = match_tokens(metric, r=r, prefix=state.prefix)
        coordinates = self._places(state, matching)
        state = state.moved(x, matching.places)
        merged, sizes = merge_tokens(x, state.sizes, matching)
        return merged, dataclasses.replace(state, sizes=sizes, coordinates=coordinates)

    def _places(self, state: MergeState, matching: Matching) -> Float[Array, "B M 2"] | None:
        """Give merged tokens the mean of their patches' coordinates, or the receiver's."""
        places = state.coordinates_of_all(state.sizes.shape[0])
        if places is None:
            return None
        if self.rope == "mean":
            return merge_tokens(places, state.sizes, matching)[0][:, state.prefix :]
        return drop_tokens(places, matching)[:, state.prefix :]

    def patch_sizes(
        self, x: Float[Array, "B N C"], state: MergeState
    ) -> Float[Array, "B M"] | None:
        """Count the patches of every token; see `Reducer.patch_sizes`."""
        return state.sizes[:, state.prefix :] if self.pool_by_size else None

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the log-sizes added to its scores, and its merge."""
        before, after = layer.tokens_in, layer.tokens_out
        total = flops.block(config, before, after)
        if layer.mode == PROPORTIONAL:
            total += config.heads * before**2
        if after < before:
            odd = before // 2
            similarity = (before + (before - odd) * odd) * config.head_dim
            total += similarity + (before + after) * config.width
        return total
