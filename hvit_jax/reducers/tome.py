"""ToMe: in every block, merge the pairs of tokens that are most alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, pool_by_size
from hvit_jax.ops.matching import Matching, match_tokens, most_merges
from hvit_jax.ops.merging import drop_tokens, merge_counts, merge_tokens
from hvit_jax.reducers.merging import (
    Counts,
    MergeState,
    Merging,
    attend_and_compare,
    counts_option,
    counts_to_try,
    log_sizes,
    merging_mode,
    usual_count,
)


@dataclass(frozen=True)
class ToMe(Merging):
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

    r: Counts | None = counts_option()
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
        return (cls(r=count) for count in counts_to_try(config))

    def resolve(self, config: ViTConfig) -> ToMe:
        """Fill in the default of `r`, and check it; see `Reducer.resolve`."""
        r = usual_count(config) if self.r is None else self.r
        resolved = dataclasses.replace(self, r=r)
        resolved.schedule(config)
        return resolved

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every block that merges."""
        layers, tokens = [], config.num_tokens
        for count in merge_counts(known(self.r), config.depth):
            left = tokens - min(count, most_merges(tokens, prefix=config.prefix_tokens))
            mode = merging_mode(config, tokens, left, weighed=self.proportional_attention)
            layers.append(Layer(tokens, left, mode))
            tokens = left
        return tuple(layers)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: MergeState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run attention weighted by size, merge, then run the MLP; see `Reducer.block`."""
        bias = log_sizes(state, layer)
        x, metric = attend_and_compare(block, x, state.coordinates, key_bias=bias)
        if layer.tokens_out == layer.tokens_in:
            return x + block.mlp(x), state
        r = layer.tokens_in - layer.tokens_out
        x, normed, state = self._merge(block, x, metric, state, r=r)
        return x + block.run_mlp(normed), state

    def _merge(
        self, block, x, metric, state: MergeState, *, r: int
    ) -> tuple[Array, Array, MergeState]:
        matching = match_tokens(metric, r=r, prefix=state.prefix, dtype=x.dtype)
        coordinates = self._places(state, matching)
        state = state.moved(x, matching.places)
        x, sizes, normed = block.merge(x, state.sizes, matching)
        return x, normed, dataclasses.replace(state, sizes=sizes, coordinates=coordinates)

    def _places(self, state: MergeState, matching: Matching) -> Float[Array, "B M 2"] | None:
        """Give merged tokens the mean of their patches' coordinates, or the receiver's."""
        places = state.coordinates_of_all(state.sizes.shape[0])
        if places is None:
            return None
        if self.rope == "mean":
            return merge_tokens(places, state.sizes, matching)[0][:, state.prefix :]
        return drop_tokens(places, matching)[:, state.prefix :]

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the log-sizes added to its scores, and its merge."""
        before, after = layer.tokens_in, layer.tokens_out
        total = super().block_flops(config, layer)
        if after < before:
            odd = before // 2
            similarity = (before + (before - odd) * odd) * config.head_dim
            total += similarity + (before + after) * config.width
        return total
