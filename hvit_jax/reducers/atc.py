"""ATC: merge patches by agglomerative clustering."""

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
from hvit_jax.ops.agglomeration import agglomerate, cosine_distances
from hvit_jax.ops.merging import merge_counts
from hvit_jax.ops.selection import behind_prefix
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
class ATC(Merging):
    """Agglomerative token clustering.

    Haurum et al. 2024, "Agglomerative Token Clustering", ECCV, arXiv 2409.11923.

    Matching in two halves, as in ToMe, cannot merge two tokens of one half. Here any can: between
    attention and MLP every patch token begins as a cluster of its own, and the two closest clusters
    are joined, by the cosine of their keys, until `r` joins are made. Each cluster becomes the mean
    of its tokens, weighted by how many input tokens each stands for, and attention weighs tokens by
    that number too. The joins follow one another, which takes time on a GPU. CLS and registers
    never merge.

    With `keep_rate` it clusters only in the blocks of `locations`, to keep_rate, then keep_rate
    squared of the input's patches, and so on.

    Differs from the original: clusters are in the order of their first patches, and are found on
    the device, not on the CPU. The original merges one token less in a block than `r` says, and so
    does this one unless `original_count` is off.
    """

    name: ClassVar[str] = "atc"

    r: Counts | None = counts_option()
    linkage: str = option(
        "average",
        "the distance of two clusters: the average of their tokens' distances, the largest, or the "
        "smallest",
        choices=("average", "complete", "single"),
    )
    proportional_attention: bool = option(
        True, "weigh attention to a token by how many input tokens it stands for"
    )
    original_count: bool = option(True, "merge one token less a block than r, as the original does")
    keep_rate: float | None = option(
        None, "in place of r, part of the patches that each of locations keeps", above=0, most=1
    )
    locations: tuple[int, ...] | None = option(
        None, "blocks that cluster by keep_rate (default: a quarter, half, 3/4 of the depth)"
    )
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[ATC]:
        """Vary how many tokens merge; see `Reducer.strengths`."""
        most = min(config.num_patches, 2 * config.num_patches // config.depth)
        return (cls(r=count) for count in range(most + 1))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[ATC]:
        """Try to merge from a quarter to 85% of the patches; see `Reducer.candidates`."""
        return (cls(r=count) for count in counts_to_try(config))

    def resolve(self, config: ViTConfig) -> ATC:
        """Fill in the default of `r` or of `locations`, and check them; see `Reducer.resolve`."""
        r, locations = self.r, self.locations
        if self.keep_rate is None:
            self.check(locations is None, "locations", "they go with keep_rate")
            r = usual_count(config) if r is None else r
        else:
            self.check(r is None, "r", "leave it out where keep_rate is given")
            locations = config.quarters if locations is None else tuple(sorted(locations))
        resolved = dataclasses.replace(self, r=r, locations=locations)
        if locations is not None:
            resolved.check_blocks("locations", config)
        resolved.schedule(config)
        return resolved

    def _left(self, config: ViTConfig) -> list[int]:
        """Count the patches after every block."""
        patches = config.num_patches
        if self.keep_rate is not None:
            stages = (
                sum(at <= block for at in known(self.locations)) for block in range(config.depth)
            )
            return [max(1, int(patches * self.keep_rate**stage)) for stage in stages]
        left = []
        for count in merge_counts(known(self.r), config.depth, method=self.name):
            patches = max(1, patches - max(0, min(count, patches) - self.original_count))
            left.append(patches)
        return left

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every block that clusters."""
        layers, tokens = [], config.num_tokens
        for patches in self._left(config):
            left = config.prefix_tokens + patches
            mode = merging_mode(config, tokens, left, weighed=self.proportional_attention)
            layers.append(Layer(tokens, left, mode))
            tokens = left
        return tuple(layers)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: MergeState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run attention, cluster, then run the MLP; see `Reducer.block`."""
        bias = log_sizes(state, layer)
        x, metric = attend_and_compare(block, x, state.coordinates, key_bias=bias)
        if joins := layer.tokens_in - layer.tokens_out:
            distances = cosine_distances(metric[:, state.prefix :])
            clusters = agglomerate(distances, joins=joins, linkage=self.linkage)
            places = behind_prefix(clusters, state.prefix)
            x, state = state.merged(x, places, tokens=layer.tokens_out)
        return x + block.mlp(x), state

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the distances, their updates and the means."""
        before, after = layer.tokens_in, layer.tokens_out
        total = super().block_flops(config, layer)
        if joins := before - after:
            patches = before - config.prefix_tokens
            total += (patches + patches**2) * config.head_dim + patches**2
            total += 4 * patches * joins * (self.linkage == "average")
            total += (before + after) * config.width
        return total
