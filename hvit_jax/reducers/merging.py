"""What methods share whose tokens merge: sizes, a state that follows, how many tokens leave."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option, steps
from hvit_jax.models.block import Block, KeyBias
from hvit_jax.models.reducer import Layer, Reducer, TokenState, initial_state
from hvit_jax.ops.merging import count_by_ratio, merge_counts, merge_groups, sum_groups
from hvit_jax.ops.precision import accumulator

PROPORTIONAL = "proportional attention"

State = TypeVar("State", bound="MergeState")
Ratio = TypeVar("Ratio", bound="ByRatio")

Counts = int | tuple[int, ...] | tuple[int, float]

# Part of the patches that merge over the depth by default: 20 a block of ViT-L/16 at 512 and of
# ViT-H/14 at 518, the middle rows of ToMe's published table. And those that `hvit compare` tries.
_USUAL, _TRIED = 0.47, (0.25, 0.4, 0.55, 0.7, 0.85)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MergeState(TokenState):
    """Trace of the patches, and how many input tokens each token stands for.

    Attributes:
        sizes: 1 for a token that never merged.
    """

    sizes: Float[Array, "B N"]

    def merged(
        self: State,
        x: Float[Array, "B N C"],
        places: Int[Array, "B N"],
        *,
        tokens: int,
        means_by: Float[Array, "B N"] | None = None,
        **changes: Any,
    ) -> tuple[Float[Array, "B M C"], State]:
        """Merge groups of tokens, and let the state follow.

        Args:
            x: tokens, the prefix first.
            places: as for `merge_groups`.
            tokens: as for `merge_groups`.
            means_by: how much each token counts in the mean of its group; None: its size.
            **changes: the state's other fields of which there is one entry a token.

        Returns:
            The means, and the state with their sizes and coordinates.
        """
        weights = self.sizes if means_by is None else means_by
        means = merge_groups(x, weights, places, tokens=tokens)
        sizes = sum_groups(self.sizes, places, tokens=tokens)
        coordinates = self.coordinates_of_all(x.shape[0])
        if coordinates is not None:
            moved = merge_groups(coordinates, weights, places, tokens=tokens)
            coordinates = moved[:, self.prefix :]
        state = self.moved(x, places)
        return means, dataclasses.replace(state, sizes=sizes, coordinates=coordinates, **changes)


@dataclass(frozen=True)
class Merging(Reducer):
    """Base of the methods that know how many tokens each token stands for.

    Blocks of mode `PROPORTIONAL` weigh attention to a token by that.
    """

    if typing.TYPE_CHECKING:  # Each method declares the option itself, behind its others.
        pool_by_size: bool

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> MergeState:
        """Make the state before the first block; see `Reducer.init`."""
        sizes = jnp.ones(x.shape[:2], accumulator(x.dtype))
        return MergeState(**initial_state(x, config, trace=trace), sizes=sizes)

    def patch_sizes(
        self, x: Float[Array, "B N C"], state: MergeState
    ) -> Float[Array, "B M"] | None:
        """Count the patches of every token; see `Reducer.patch_sizes`."""
        return state.sizes[:, state.prefix :] if self.pool_by_size else None

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, and the log-sizes that are added to its scores."""
        total = super().block_flops(config, layer)
        if layer.mode == PROPORTIONAL:
            total += config.heads * layer.tokens_in**2
        return total


def counts_option(
    about: str = "tokens merged a block",
    default: str = " (default: 47% of the patches over the depth)",
) -> Any:
    """Declare an option that tells, as `merge_counts` reads it, how many tokens leave each block.

    Args:
        about: which tokens.
        default: what stands for None, as the help has it; nothing for a way in place of another.
    """
    return option(
        None,
        f"{about}: a number, a list with one a block, or a number and an inflection written with a "
        f"point, such as 8,-0.5{default}",
    )


@dataclass(frozen=True)
class ByRatio(Reducer):
    """Base of the methods by which a part of the tokens remains after every block."""

    ratio: float | None = option(
        None,
        "part of the tokens that remain after every block (default: 47% of the patches leave over "
        "the depth)",
        above=0,
        most=1,
    )
    r: Counts | None = counts_option("in place of --ratio, tokens that leave in each block", "")

    @classmethod
    def strengths(cls: type[Ratio], config: ViTConfig) -> Iterable[Ratio]:
        """Vary the part that remains, down to half; see `Reducer.strengths`."""
        return (cls(ratio=1 - share / 2) for share in (0, *steps(60)))

    @classmethod
    def candidates(cls: type[Ratio], config: ViTConfig) -> Iterable[Ratio]:
        """Try to let from a quarter to 85% of the patches leave; see `Reducer.candidates`."""
        return (cls(ratio=(1 - part) ** (1 / config.depth)) for part in _TRIED)

    def resolve(self: Ratio, config: ViTConfig) -> Ratio:
        """Fill in the ratio, and check it or `r`; see `Reducer.resolve`."""
        self.check(self.r is None or self.ratio is None, "ratio", "leave it out where r is given")
        resolved = self
        if self.r is None and self.ratio is None:
            resolved = dataclasses.replace(self, ratio=(1 - _USUAL) ** (1 / config.depth))
        resolved.schedule(config)
        return resolved

    def leaving(self, config: ViTConfig, block: int, *, tokens: int, most: int) -> int:
        """Count the tokens that leave in a block.

        Args:
            config: the model's sizes.
            block: its number.
            tokens: of which the ratio is a part.
            most: as many at most.
        """
        if self.r is not None:
            return min(merge_counts(self.r, config.depth, method=self.name)[block], most)
        assert self.ratio is not None, "resolve fills it in"
        return min(count_by_ratio(self.ratio, tokens), most)


def usual_count(config: ViTConfig, blocks: int | None = None) -> int:
    """Count the tokens that merge in each of some blocks, all of them unless told, by default."""
    return max(1, round(_USUAL * config.num_patches / (blocks or config.depth)))


def merging_mode(config: ViTConfig, tokens: int, left: int, *, weighed: bool) -> str:
    """Name how a block runs.

    Args:
        config: the model's sizes.
        tokens: how many enter the block.
        left: how many leave it.
        weighed: whether attention weighs tokens by size. Sizes are 1 before the first merge, and
            their logarithms 0.
    """
    if weighed and tokens < config.num_tokens:
        return PROPORTIONAL
    return "merge" if left < tokens else "dense"


def counts_to_try(config: ViTConfig) -> Iterable[int]:
    """List how many tokens are tried to merge in each block: a quarter to 85% over the depth."""
    even = config.num_patches / config.depth
    return (max(1, round(part * even)) for part in _TRIED)


def attend_and_compare(
    block: Block,
    x: Float[Array, "B N C"],
    coordinates: Float[Array, "b P 2"] | None,
    *,
    key_bias: KeyBias | None = None,
) -> tuple[Float[Array, "B N C"], Float[Array, "B N D"]]:
    """Run a block's attention, and give what tokens are compared by.

    Args:
        block: the block.
        x: tokens, the prefix first.
        coordinates: as for `Block.qkv`.
        key_bias: as for `Block.attend`.

    Returns:
        The tokens after attention, and the mean of their keys over the heads in float32: of what
        tokens hold, not of where they are, so before the keys are turned.
    """
    q, k, v = block.qkv(x)
    compared = k.array.mean(2, dtype=accumulator(k.dtype))
    q, k = block.rotate(q, coordinates), block.rotate(k, coordinates)
    return x + block.attend_and_project(q, k, v, key_bias=key_bias), compared


def log_sizes(state: MergeState, layer: Layer) -> Float[Array, "B N"] | None:
    """Give the bias of proportional attention; None where a block has none."""
    return jnp.log(state.sizes) if layer.mode == PROPORTIONAL else None
