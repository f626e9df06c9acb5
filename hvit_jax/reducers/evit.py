"""EViT: drop the patch tokens that get little attention, in a few blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.ops.attention import class_attention
from hvit_jax.ops.selection import best_places, descending_order, keep_best, kept_tokens


@dataclass(frozen=True)
class EViT(Reducer):
    """Token selection by attention in a few blocks.

    Liang et al. 2022, "Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations", arXiv 2202.07800.

    A patch that the other tokens hardly look at adds little to the result. In each block of
    `drop_locations`, between attention and MLP, the patch tokens are sorted by the attention that
    they get, and only the first ceil(keep_rate * P) stay, in that order; CLS always stays. The
    others are gone, or `fuse_token` sums them, each times its score, into one more patch token.
    Such a block looks at its whole attention matrix once more, to score the tokens; all others run
    the fused attention alone. Where a rate keeps all tokens the block runs without reduction.

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
            locations = tuple(sorted({config.depth * quarter // 4 for quarter in (1, 2, 3)}))
        resolved = dataclasses.replace(self, drop_locations=locations)
        resolved.check(0 < self.keep_rate <= 1, "keep_rate", "above 0 and at most 1")
        last = config.depth - 1
        inside = all(0 <= location <= last for location in locations)
        resolved.check(inside, "drop_locations", f"the model's blocks are 0 to {last}")
        once = len(set(locations)) == len(locations)
        resolved.check(once, "drop_locations", "every block may appear only once")
        return resolved

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every dropping block."""
        layers, tokens, locations = [], config.num_patches + 1, known(self.drop_locations)
        for index in range(config.depth):
            keep = kept_tokens(self.keep_rate, tokens - 1)
            if index in locations and keep < tokens - 1:
                layers.append(Layer(tokens, 1 + keep + self.fuse_token, "drop"))
            else:
                layers.append(Layer(tokens, tokens))
            tokens = layers[-1].tokens_out
        return tuple(layers)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: TokenState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run the block; if it is a dropping one, select tokens before its MLP."""
        if layer.mode == "dense":
            return block(x), state
        q, k, v = block.qkv(x)
        if self.score == "cls":
            attended, scores = block.attend(q, k, v), class_attention(q, k)
        else:
            attended, columns = block.attend_and_score(q, k, v)
            scores = columns[:, 1:]
        x = x + block.project(attended)
        x, state = self._select(x, scores, state, layer)
        return x + block.mlp(x), state

    def _select(self, x, scores, state, layer):
        keep, fuse = layer.tokens_out - 1 - self.fuse_token, self.fuse_token
        order = descending_order(scores)
        if state.source is not None:
            state = state.moved(x, best_places(order, keep=keep, fuse=fuse))
        return keep_best(x, scores, order, keep=keep, fuse=fuse), state

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the head-mean of its scores and the fused token."""
        total = super().block_flops(config, layer)
        if layer.mode == "drop":
            tokens = layer.tokens_in
            total += tokens if self.score == "cls" else tokens**2
            total += self.fuse_token * (tokens - layer.tokens_out + 1) * config.width
        return total
