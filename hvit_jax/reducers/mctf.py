"""MCTF: fuse tokens before attention by several criteria at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, pool_by_size
from hvit_jax.ops import flops
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.matching import unit_vectors
from hvit_jax.ops.merging import merge_groups
from hvit_jax.ops.precision import accurate_einsum
from hvit_jax.ops.selection import behind_prefix
from hvit_jax.ops.sorting import ranks
from hvit_jax.reducers.merging import (
    PROPORTIONAL,
    MergeState,
    Merging,
    counts_to_try,
    log_sizes,
    merging_mode,
    usual_count,
)

# Of the attention that a token gets: without any it has no weight, and means of such do not exist.
_LEAST = 1e-12


@dataclass(frozen=True)
class MCTF(Merging):
    """Multi-criteria token fusion.

    Lee et al. 2024, "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
    Transformers", CVPR, arXiv 2403.10030.

    Two tokens may be fused if they are alike, if neither tells much, and if neither is large. A
    pair's score is the product of three factors: the cosine of the tokens; how little attention
    both get in this block; and how small they are. Each has a temperature that flattens it, 0
    leaves it out. Tokens take turns as in ToMe, and the pairs of highest score fuse, half of them
    in one direction, the other half in the other. The fused token is a mean weighted by attention
    and size. All this happens before the block attends, with the attention of the tokens as they
    were (`one_step_ahead=1`): rows and columns of fused tokens are averaged and summed, which is
    computed as attention to the fused values, without the map itself. With 2 it is computed anew.
    CLS and registers never fuse.

    Differs from the original: what attention a token gets counts as 1e-12 at least.
    """

    name: ClassVar[str] = "mctf"

    r: int | float | None = option(
        None,
        "tokens fused in a block, or below 1 the part of the patches (default: 47% of the patches "
        "over the depth)",
        least=0,
    )
    blocks: tuple[int, ...] | None = option(
        None, "fuse in these blocks (default: all but the first)"
    )
    tau_similarity: float = option(1.0, "temperature of the similarity; 0 leaves it out", least=0)
    tau_information: float = option(20.0, "temperature of the information", least=0)
    tau_size: float = option(40.0, "temperature of the sizes", least=0)
    bidirectional: bool = option(True, "let both halves of the tokens propose")
    pooling: str = option(
        "attention", "what weighs tokens in a fused one", choices=("attention", "size")
    )
    one_step_ahead: int = option(
        1, "1: average the attention before fusing; 2: attend anew", least=1, most=2
    )
    proportional_attention: bool = option(
        True, "weigh attention to a token by how many input tokens it stands for"
    )
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[MCTF]:
        """Vary how many tokens fuse; see `Reducer.strengths`."""
        most = max(1, config.num_patches // max(1, config.depth - 1))
        return (cls(r=count) for count in range(most + 1))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[MCTF]:
        """Try to fuse from a quarter to 85% of the patches; see `Reducer.candidates`."""
        return (cls(r=count) for count in counts_to_try(config))

    def resolve(self, config: ViTConfig) -> MCTF:
        """Fill in `r` and the blocks, and check them; see `Reducer.resolve`."""
        blocks = tuple(range(1, config.depth)) if self.blocks is None else self.blocks
        r = usual_count(config, len(blocks)) if self.r is None else self.r
        self.check(r < 1 or r == int(r), "r", "a whole number, or a part below 1")
        resolved = dataclasses.replace(self, r=r, blocks=blocks)
        resolved.check_blocks("blocks", config)
        return resolved

    def _count(self, tokens: int, patches: int) -> int:
        r = known(self.r)
        count = int(patches * r) if 0 < r < 1 else min(int(r), tokens - 10)
        return max(0, min(count, patches // 2))

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens in and after every block that fuses."""
        layers, tokens = [], config.num_tokens
        for block in range(config.depth):
            patches = tokens - config.prefix_tokens
            count = self._count(tokens, patches) if block in known(self.blocks) else 0
            left = tokens - count
            mode = merging_mode(config, tokens, left, weighed=self.proportional_attention)
            layers.append(Layer(tokens, left, mode))
            tokens = left
        return tuple(layers)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: MergeState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Fuse tokens, run attention as it was before that, then run the MLP."""
        q, k, v = block.qkv(x, state.coordinates)
        bias = log_sizes(state, layer)
        if layer.tokens_out == layer.tokens_in:
            x = x + block.attend_and_project(q, k, v, key_bias=bias)
            return x + block.mlp(x), state
        received = jnp.maximum(block.attend_and_score(q, k, v, key_bias=bias)[1], _LEAST)
        places = self._match(x, received, state, r=layer.tokens_in - layer.tokens_out)
        weights = self._weights(received, state)
        fused, state = state.merged(x, places, tokens=layer.tokens_out, means_by=weights)
        if self.one_step_ahead == 1:
            # Columns of a group are summed: attention to the value of the group, once for each.
            values = gather(block.values(fused), places)
            rows = block.attend(q, k, values, key_bias=bias)
            flat = rows.reshape(*rows.shape[:2], -1)
            means = merge_groups(flat, weights, places, tokens=layer.tokens_out)
            attended = means.reshape(x.shape[0], layer.tokens_out, *rows.shape[2:])
        else:
            bias = jnp.log(state.sizes) if self.proportional_attention else None
            attended = block.attend(*block.qkv(fused, state.coordinates), key_bias=bias)
        x = fused + block.project(attended)
        return x + block.mlp(x), state

    def _weights(self, received, state: MergeState) -> Float[Array, "B N"]:
        """Tell how much each token counts in a fused one."""
        return state.sizes * received if self.pooling == "attention" else state.sizes

    def _match(self, x, received, state: MergeState, *, r: int) -> Int[Array, "B N"]:
        """Tell what each token becomes a part of."""
        # Of the prefix an even number stands apart, so that one at most takes turns; see ToMe.
        apart = state.prefix - state.prefix % 2
        scores = self._scores(*(each[:, apart:] for each in (x, received, state.sizes)))
        match = both_ways if self.bidirectional else one_way
        places = match(scores, r=r, class_token=bool(state.prefix % 2))
        return behind_prefix(places, apart)

    def _scores(self, x, received, sizes) -> Float[Array, "B A O"]:
        """Score all pairs of an even and an odd token, in float32; no gradient flows into it."""
        received, sizes = jax.lax.stop_gradient((received.astype(sizes.dtype), sizes))
        unit = unit_vectors(x)
        cosine = accurate_einsum("bac,boc->bao", unit[:, ::2], unit[:, 1::2])
        # Rounded, a cosine can be below -1.
        score = _power(jnp.maximum((cosine + 1) / 2, 0), self.tau_similarity)
        for values, tau in ((1 / received, self.tau_information), (1 / sizes, self.tau_size)):
            factor = _power(values / values.max(1, keepdims=True), tau)
            score = score * (factor[:, ::2, None] * factor[:, None, 1::2])
        return score

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: TokenState,
        after: TokenState,
        layer: Layer,
    ) -> Int[Array, "B P"] | None:
        """See `Reducer.attended_source`; tokens attend as before they fused, or anew."""
        return before.source if self.one_step_ahead == 1 else after.source

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the attention looked at before fusing, scores and means."""
        before, after, width, heads = layer.tokens_in, layer.tokens_out, config.width, config.heads
        if after == before:
            return super().block_flops(config, layer)
        weighed = layer.mode == PROPORTIONAL
        odd = before // 2
        total = 4 * before * width + flops.linear(before, width, 2 * width)
        total += before * width + before**2 * width + (5 + weighed) * heads * before**2 + before**2
        total += before * width + (before - odd) * odd * (width + 7)
        total += before + (before + after) * width
        if self.one_step_ahead == 1:
            total += heads * (before * after + after**2) + 4 * after * width
            total += flops.linear(after, width, width) + after**2 * width
        else:
            total += flops.queries_keys_values(config, after)
            total += flops.attention(config, after, after)
            total += heads * after**2 * self.proportional_attention
        return total + flops.projection(config, after) + flops.mlp(config, after)


def _power(x: Float[Array, "*shape"], tau: float) -> Float[Array, "*shape"]:
    """Flatten a factor by its temperature; 0 leaves it out."""
    if tau == 0:
        return jnp.ones_like(x)
    return x if tau == 1 else x ** (1 / tau)


def one_way(score: Float[Array, "B A O"], *, r: int, class_token: bool) -> Int[Array, "B N"]:
    """Match tokens at even places with those at odd ones: the `r` best proposals win.

    Args:
        score: of all pairs of an even and an odd token.
        r: tokens that join another.
        class_token: whether the first token never does.

    Returns:
        What each token becomes a part of: the even ones that stay come first, then the odd ones.
    """
    joins, target = _even_joins(score, r, class_token)
    stays = jnp.cumsum(~joins, axis=1, dtype=jnp.int32) - 1
    left = score.shape[1] - r
    even = jnp.where(joins, left + target, stays)
    odd = left + jax.lax.broadcasted_iota(jnp.int32, (score.shape[0], score.shape[2]), 1)
    return _interleave(even, odd)


def both_ways(score: Float[Array, "B A O"], *, r: int, class_token: bool) -> Int[Array, "B N"]:
    """Match as `one_way` half of the tokens, and the other half in the other direction.

    Args:
        score: of all pairs of an even and an odd token.
        r: tokens that join another; r // 2 of them are even.
        class_token: whether the first token never does, nor is joined.

    Returns:
        What each token becomes a part of: the even ones that stay come first, then the odd ones
        that do, in falling order of their best score.
    """
    first = r // 2
    second = r - first
    joins, target = _even_joins(score, first, class_token)
    left = score.shape[1] - first
    stays = jnp.cumsum(~joins, axis=1, dtype=jnp.int32) - 1
    open_rows = ~joins
    if class_token:
        open_rows = open_rows & (jnp.arange(score.shape[1]) > 0)[None]
    back = jnp.where(open_rows[:, :, None], score, -jnp.inf)
    best, partner = back.max(1), back.argmax(1).astype(jnp.int32)
    rank = ranks(-best)
    odd = jnp.where(rank < second, gather(stays, partner), left + rank - second)
    even = jnp.where(joins, gather(odd, target), stays)
    return _interleave(even, odd)


def _even_joins(score, r: int, class_token: bool):
    """Tell which even tokens join an odd one, and which."""
    best, target = score.max(2), score.argmax(2).astype(jnp.int32)
    if class_token:
        best = jnp.where(jnp.arange(score.shape[1])[None] == 0, -jnp.inf, best)
    return ranks(-best) < r, target


def _interleave(even, odd) -> Int[Array, "B N"]:
    tokens = even.shape[1] + odd.shape[1]
    if odd.shape[1] < even.shape[1]:
        odd = jnp.pad(odd, ((0, 0), (0, 1)))
    return jnp.stack([even, odd], axis=-1).reshape(even.shape[0], -1)[:, :tokens]
