"""EViT: drop the patch tokens that get little attention, in a few blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState, initial_state, pool_by_size
from hvit_jax.ops import flops
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.clustering import reconstruct_tokens
from hvit_jax.ops.selection import (
    best_places,
    descending_order,
    fuse_dropped,
    keep_best,
    kept_tokens,
)
from hvit_jax.ops.sorting import inverse


@dataclass(frozen=True)
class DropLayer(Layer):
    """A block that drops tokens, by its number: no two share a program.

    What they carry differs even where both fuse one token and so keep their number.
    """

    number: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropping:
    """One dropping block's choice.

    Attributes:
        before: the patch tokens that it chose of.
        order: them by falling score; the first ones stayed.
    """

    before: Float[Array, "B P C"]
    order: Int[Array, "B P"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EViTState(TokenState):
    """Trace of the patches, and how many of them each patch token stands for.

    Attributes:
        sizes: 1 but for tokens that were fused; None if the method fuses none.
        droppings: of every dropping block so far, if dropped patches are restored by them.
    """

    sizes: Float[Array, "B M"] | None = None
    droppings: tuple[Dropping, ...] = ()


@dataclass(frozen=True)
class EViT(Reducer):
    """Token selection by attention in a few blocks.

    Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations", arXiv 2202.07800.

    A patch that the other tokens hardly look at adds little to the result. In each block of
    `drop_locations`, between attention and MLP, the patch tokens are sorted by the attention that
    they get, and only the first ceil(keep_rate * P) stay, in that order; CLS and registers always
    stay. The others are gone, or `fuse_token` sums them, each times its score, into one more patch
    token. Such a block looks at its whole attention matrix once more, to score the tokens; all
    others run the fused attention alone. Where a rate keeps all tokens the block runs without
    reduction.

    Differs from the paper: as in the published tables, the score is the attention from all tokens,
    not from CLS alone, and nothing is fused; `score="cls"` and `fuse_token` give the paper's.
    """

    name: ClassVar[str] = "evit"

    keep_rate: float = option(
        0.7, "fraction of the patch tokens that a dropping block keeps, above 0 and at most 1"
    )
    drop_locations: tuple[int, ...] | None = option(
        None, "blocks that drop, counted from 0 (default: a quarter, half, 3/4 of the depth)"
    )
    fuse_token: bool = option(False, "sum the dropped tokens into one instead of losing them")
    score: str = option(
        "mean", "whose attention counts: all tokens' or CLS's", choices=("mean", "cls")
    )
    reconstruct_neighbors: int | None = option(
        None,
        "restore a dropped patch from so many kept ones that were nearest to it (default: 1 in a "
        "model with a decoder, as published; else it keeps its last value)",
        least=1,
    )
    reconstruct_temperature: float = option(
        0.005, "factor on that negative squared distance", above=0
    )
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[EViT]:
        """Vary the keep rate; see `Reducer.strengths`."""
        return (cls(keep_rate=rate) for rate in steps())

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[EViT]:
        """Try five keep rates; see `Reducer.candidates`."""
        return (cls(keep_rate=rate) for rate in (0.5, 0.6, 0.7, 0.8, 0.9))

    def resolve(self, config: ViTConfig) -> EViT:
        """Fill in the dropping blocks; see `Reducer.resolve`."""
        locations = self.drop_locations
        if locations is None:
            locations = config.quarters
        neighbors = self.reconstruct_neighbors
        if neighbors is None and config.decoder is not None:
            neighbors = 1
        resolved = dataclasses.replace(
            self, drop_locations=locations, reconstruct_neighbors=neighbors
        )
        resolved.check(0 < self.keep_rate <= 1, "keep_rate", "above 0 and at most 1")
        resolved.check_blocks("drop_locations", config)
        exists = self.score == "mean" or config.class_token
        resolved.check(exists, "score", "the model has no CLS; use 'mean'")
        return resolved

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every dropping block."""
        layers, tokens, locations = [], config.num_tokens, known(self.drop_locations)
        prefix = config.prefix_tokens
        for index in range(config.depth):
            keep = kept_tokens(self.keep_rate, tokens - prefix)
            if index in locations and keep < tokens - prefix:
                left = prefix + keep + self.fuse_token
                layers.append(DropLayer(tokens, left, "drop", index))
            else:
                layers.append(Layer(tokens, tokens))
            tokens = layers[-1].tokens_out
        return tuple(layers)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> EViTState:
        """Make the state before the first block; see `Reducer.init`."""
        sizes = jnp.ones((x.shape[0], config.num_patches)) if self.fuse_token else None
        return EViTState(**initial_state(x, config, trace=trace), sizes=sizes)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: EViTState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], EViTState]:
        """Run the block; if it is a dropping one, select tokens before its MLP."""
        if layer.mode == "dense":
            return block(x, state.coordinates), state
        q, k, v = block.qkv(x, state.coordinates)
        if self.score == "cls":
            attended, scores = block.attend_and_score_patches(q, k, v, prefix=state.prefix)
        else:
            attended, columns = block.attend_and_score(q, k, v)
            scores = columns[:, state.prefix :]
        x = x + block.project(attended)
        x, state = self._select(x, scores, state, layer)
        return x + block.mlp(x), state

    def _select(self, x, scores, state: EViTState, layer: Layer) -> tuple[Array, EViTState]:
        prefix, fuse = state.prefix, self.fuse_token
        keep = layer.tokens_out - prefix - fuse
        order = descending_order(scores)
        followed = dataclasses.replace(
            state,
            coordinates=self._places(state, scores, order, keep),
            sizes=None if state.sizes is None else fuse_dropped(state.sizes, order, keep=keep),
        )
        if state.source is not None and self.reconstruct_neighbors is not None:
            dropping = Dropping(x[:, prefix:], order)
            followed = dataclasses.replace(followed, droppings=(*state.droppings, dropping))
        if state.source is not None:
            followed = followed.moved(x, best_places(order, prefix=prefix, keep=keep, fuse=fuse))
        return keep_best(x, scores, order, prefix=prefix, keep=keep, fuse=fuse), followed

    def _places(self, state: EViTState, scores, order, keep: int) -> Float[Array, "B M 2"] | None:
        """Let coordinates follow the kept tokens; the fused one's are their mean by score."""
        ordered = state.coordinates_of(order)
        if ordered is None or not self.fuse_token:
            return state.coordinates_of(order[:, :keep])
        weights = gather(scores, order[:, keep:])[..., None]
        fused = (weights * ordered[:, keep:]).sum(1, keepdims=True)
        total = jnp.maximum(weights.sum(1, keepdims=True), 1e-12)
        return jnp.concatenate([ordered[:, :keep], fused / total], axis=1)

    def restore(self, tokens: Float[Array, "B N C"], state: EViTState) -> Float[Array, "B P C"]:
        """Put tokens back, block by block from the last that dropped; see `Reducer.restore`.

        A dropped patch becomes what was made of the kept ones nearest to it, as Liang et al. 2022,
        arXiv 2210.01035, restore it.
        """
        if not state.droppings:
            return super().restore(tokens, state)
        patches = tokens[:, state.prefix :]
        for dropping in reversed(state.droppings):
            kept = patches[:, : patches.shape[1] - self.fuse_token]
            ordered = gather(dropping.before, dropping.order)
            count = kept.shape[1]
            restored = reconstruct_tokens(
                ordered[:, count:],
                ordered[:, :count],
                kept,
                k=known(self.reconstruct_neighbors),
                temperature=self.reconstruct_temperature,
            )
            patches = gather(jnp.concatenate([kept, restored], axis=1), inverse(dropping.order))
        return patches

    def patch_sizes(self, x: Float[Array, "B N C"], state: EViTState) -> Float[Array, "B M"] | None:
        """Count the patches of every token; see `Reducer.patch_sizes`."""
        return state.sizes if self.pool_by_size else None

    def restore_flops(self, config: ViTConfig, channels: int) -> int:
        """Count the reconstruction of dropped patches; see `Reducer.restore_flops`."""
        if self.reconstruct_neighbors is None:
            return 0
        total, outside = 0, config.prefix_tokens + self.fuse_token
        for layer in self.schedule(config):
            if layer.mode == "drop":
                kept = layer.tokens_out - outside
                dropped = layer.tokens_in - config.prefix_tokens - kept
                total += flops.nearest_sums(config, dropped, kept, channels)
        return total

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the head-mean of its scores and the fused token."""
        total = super().block_flops(config, layer)
        if layer.mode == "drop":
            tokens = layer.tokens_in
            total += tokens if self.score == "cls" else tokens**2
            total += self.fuse_token * (tokens - layer.tokens_out + 1) * config.width
        return total
