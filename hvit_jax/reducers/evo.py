"""Evo-ViT: run the later blocks on the most attended patch tokens only, and keep the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState, initial_state
from hvit_jax.ops import flops
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.precision import accumulator
from hvit_jax.ops.selection import (
    descending_order,
    new_places,
    put_tokens,
    running_score,
    take_tokens,
)

# The middle rows of the published tables, and for 12 blocks the paper's choice.
_PUBLISHED = {12: (4, 0.5), 24: (8, 0.6), 32: (14, 0.5)}


@dataclass(frozen=True)
class EvoLayer(Layer):
    """A block that scores its tokens, and runs on the prefix and `processed` patches only."""

    processed: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvoState(TokenState):
    """Trace of the patches, and the running scores.

    Attributes:
        scores: of every patch token, in float32; in falling order since the last sort.
        order: where the patch token of each score stands. None if the state is traced: then the
            tokens themselves are sorted.
    """

    scores: Float[Array, "B P"]
    order: Int[Array, "B P"] | None = None


@dataclass(frozen=True)
class EvoViT(Reducer):
    """Slow and fast tokens, told apart by a running score.

    Xu et al. 2022, "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer",
    arXiv 2108.01390.

    Every block looks at how much CLS attends to each patch token, and a running score remembers it:
    the first block's attention at first, then (1 - tradeoff) * score + tradeoff * attention. From
    block `prune_location` on, the tokens are sorted by that score and only the first
    int(prune_ratio * P) go through the block, with CLS and registers. The others wait as
    placeholders, with value and score unchanged, and may come back in any later block: no token is
    ever lost.

    A model without CLS scores its patches by the attention that they get from all of those that the
    block runs on.

    Differs from the paper: as in the published tables, placeholders are not summarised into a
    token that the block updates for them.
    """

    name: ClassVar[str] = "evo"
    alone: ClassVar[str] = "the tokens that it leaves out wait for the last block"

    prune_location: int | None = option(
        None,
        "first block that leaves tokens out, at least 1 (default: as published; a third of the "
        "depth for other sizes)",
    )
    prune_ratio: float | None = option(
        None,
        "fraction of the patch tokens that such a block runs on, above 0 and at most 1 (default: "
        "as published; 0.5 for other sizes)",
    )
    tradeoff: float = option(0.5, "weight of a block's own attention in the running score, 0 to 1")

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[EvoViT]:
        """Vary the fraction of the tokens; see `Reducer.strengths`."""
        return (cls(prune_ratio=f) for f in steps() if f * config.num_patches >= 1)

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[EvoViT]:
        """Try two places and three fractions of the tokens; see `Reducer.candidates`."""
        # Block 0 gives the first scores, so that a model of one block leaves nothing to try.
        places = config.blocks_at(1 / 3, 1 / 2) if config.depth > 1 else ()
        ratios = sorted({max(1 / config.num_patches, ratio) for ratio in (0.35, 0.5, 0.65)})
        return (cls(prune_location=at, prune_ratio=f) for at in places for f in ratios)

    def resolve(self, config: ViTConfig) -> EvoViT:
        """Fill in location and ratio; see `Reducer.resolve`."""
        location, ratio = _PUBLISHED.get(config.depth, (max(1, config.depth // 3), 0.5))
        if self.prune_location is not None:
            location = self.prune_location
        if self.prune_ratio is not None:
            ratio = self.prune_ratio
        resolved = dataclasses.replace(self, prune_location=location, prune_ratio=ratio)
        resolved._check(config)
        return resolved

    def _check(self, config: ViTConfig) -> None:
        last, patches = config.depth - 1, config.num_patches
        self.check(
            1 <= known(self.prune_location) <= last,
            "prune_location",
            f"at least 1, for block 0 gives the first scores, and the last block is {last}",
        )
        ratio = known(self.prune_ratio)
        self.check(0 < ratio <= 1, "prune_ratio", "above 0 and at most 1")
        self.check(
            int(ratio * patches) >= 1,
            "prune_ratio",
            f"leaves none of {patches} patch tokens; at least {math.ceil(1e4 / patches) / 1e4}",
        )
        self.check(0 <= self.tradeoff <= 1, "tradeoff", "between 0 and 1")

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """All tokens everywhere; from `prune_location` on a block runs on some of them."""
        patches = config.num_patches
        sizes = (config.num_tokens, config.num_tokens)
        first = EvoLayer(*sizes, "first", patches)
        scoring = EvoLayer(*sizes, "score", patches)
        pruning = EvoLayer(*sizes, "prune", int(known(self.prune_ratio) * patches))
        location = known(self.prune_location)
        before, after = location - 1, config.depth - location
        return (first, *(scoring,) * before, *(pruning,) * after)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> EvoState:
        """Make the state before the first block; see `Reducer.init`."""
        scores = jnp.zeros((x.shape[0], config.num_patches), accumulator(x.dtype))
        order = None if trace else _places(scores)
        # Traced tokens will be sorted, each image's by itself.
        state = initial_state(x, config, trace=trace, by_image=trace)
        return EvoState(**state, scores=scores, order=order)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: EvoState, layer: EvoLayer, draws: Any
    ) -> tuple[Float[Array, "B M C"], EvoState]:
        """Run the block on all tokens or on those of the highest scores, and score them."""
        active, chosen, coordinates = x, None, state.coordinates
        if layer.mode == "prune":
            x, order, state = _sort(x, state)
            chosen = order[:, : layer.processed]
            active = take_tokens(x, chosen, prefix=state.prefix)
            coordinates = state.coordinates_of(chosen)
        q, k, v = block.qkv(active, coordinates)
        attended, scores = block.attend_and_score_patches(q, k, v, prefix=state.prefix)
        active = active + block.project(attended)
        active = active + block.mlp(active)
        if layer.mode != "first":
            old = state.scores[:, : layer.processed]
            scores = running_score(old, scores, tradeoff=self.tradeoff)
        scores = jnp.concatenate([scores, state.scores[:, layer.processed :]], axis=1)
        x = active if chosen is None else put_tokens(x, chosen, active, prefix=state.prefix)
        return x, dataclasses.replace(state, scores=scores)

    def groups(
        self, block: Block, x: Float[Array, "B N C"], after: EvoState, layer: EvoLayer, draws: Any
    ) -> Int[Array, "B P"]:
        """Every patch is its own group, and placeholders are left out."""
        source = super().groups(block, x, after, layer, draws)
        return jnp.where(source < after.prefix + layer.processed, source, -1)

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: TokenState,
        after: TokenState,
        layer: Layer,
    ) -> Int[Array, "B P"] | None:
        """See `Reducer.attended_source`; tokens are sorted before a block attends."""
        return after.source

    def block_flops(self, config: ViTConfig, layer: EvoLayer) -> int:
        """Count the block on the tokens that it runs on, and the head-mean of its attention."""
        tokens = config.prefix_tokens + layer.processed
        return flops.block(config, tokens, tokens) + tokens**2


def _sort(x, state: EvoState) -> tuple[Array, Array, EvoState]:
    """Sort the scores; the tokens only where a trace shows where they stand: all would move."""
    ranking = descending_order(state.scores)
    scores = gather(state.scores, ranking)
    if state.order is None:
        coordinates = state.coordinates_of(ranking)
        state = state.moved(x, new_places(ranking, prefix=state.prefix))
        state = dataclasses.replace(state, scores=scores, coordinates=coordinates)
        return take_tokens(x, ranking, prefix=state.prefix), _places(scores), state
    order = gather(state.order, ranking)
    return x, order, dataclasses.replace(state, scores=scores, order=order)


def _places(scores) -> Int[Array, "B P"]:
    return jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
