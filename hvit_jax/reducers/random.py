"""Random: the baseline that drops patches by chance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.ops.merging import merge_counts
from hvit_jax.ops.selection import best_places, descending_order, kept_tokens, take_tokens
from hvit_jax.ops.sorting import sort
from hvit_jax.reducers.merging import Counts, counts_option


@dataclass(frozen=True)
class Random(Reducer):
    """Dropping of random patches: a baseline.

    Whatever chooses tokens well must beat chance. Between attention and MLP a block drops patches
    that random numbers choose, the same for all pictures, and the others keep their order. The
    blocks and counts are EViT's (`keep_rate`, `drop_locations`) or ToMe's (`r`), to be compared
    with these. CLS and registers always stay. One seed is one sample: report the mean over several.
    """

    name: ClassVar[str] = "random"
    baseline: ClassVar[bool] = True

    keep_rate: float | None = option(
        None,
        "fraction of the patch tokens that a dropping block keeps (default: 0.7)",
        above=0,
        most=1,
    )
    drop_locations: tuple[int, ...] | None = option(
        None, "blocks that drop, counted from 0 (default: a quarter, half, 3/4 of the depth)"
    )
    r: Counts | None = counts_option("in place of keep_rate, tokens that go in each block", "")
    drop_seed: int = option(0, "seed of the choice", least=0, most=2**32 - 1)

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[Random]:
        """Vary the keep rate; see `Reducer.strengths`."""
        return (cls(keep_rate=rate) for rate in steps())

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[Random]:
        """Try five keep rates; see `Reducer.candidates`."""
        return (cls(keep_rate=rate) for rate in (0.5, 0.6, 0.7, 0.8, 0.9))

    def resolve(self, config: ViTConfig) -> Random:
        """Fill in rate and blocks, and check all options; see `Reducer.resolve`."""
        rate, locations = self.keep_rate, self.drop_locations
        if self.r is not None:
            self.check(rate is None, "keep_rate", "leave it out where r is given")
            self.check(locations is None, "drop_locations", "leave it out where r is given")
        else:
            rate = 0.7 if rate is None else rate
            locations = config.quarters if locations is None else locations
        resolved = dataclasses.replace(self, keep_rate=rate, drop_locations=locations)
        if locations is not None:
            resolved.check_blocks("drop_locations", config)
        resolved.schedule(config)
        return resolved

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every dropping block."""
        layers, prefix, patches = [], config.prefix_tokens, config.num_patches
        for block in range(config.depth):
            kept = patches
            if self.r is not None:
                counts = merge_counts(self.r, config.depth, method=self.name)
                kept = max(1, patches - counts[block])
            elif block in known(self.drop_locations):
                kept = kept_tokens(known(self.keep_rate), patches)
            mode = "drop" if kept < patches else "dense"
            layers.append(Layer(prefix + patches, prefix + kept, mode))
            patches = kept
        return tuple(layers)

    def draws(self, config: ViTConfig) -> tuple[Any, ...]:
        """Draw a number between 0 and 1 for each patch of every block that drops."""
        with jax.ensure_compile_time_eval():
            key = jax.random.key(self.drop_seed, impl="threefry2x32")
            return tuple(
                jax.random.uniform(
                    jax.random.fold_in(key, block),
                    (layer.tokens_in - config.prefix_tokens,),
                    jnp.float32,
                )
                if layer.mode == "drop"
                else None
                for block, layer in enumerate(self.schedule(config))
            )

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: TokenState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run the block; if it is a dropping one, choose before its MLP."""
        if layer.mode == "dense":
            return block(x, state.coordinates), state
        x = x + block.attend_and_project(*block.qkv(x, state.coordinates))
        kept = layer.tokens_out - state.prefix
        order = descending_order(draws[None])
        # Those that stay keep their order.
        order = jnp.concatenate([sort(order[:, :kept]), order[:, kept:]], axis=1)
        order = jnp.broadcast_to(order, (x.shape[0], order.shape[1]))
        places = best_places(order, prefix=state.prefix, keep=kept)
        coordinates = state.coordinates_of(order[:, :kept])
        state = dataclasses.replace(state.moved(x, places), coordinates=coordinates)
        x = take_tokens(x, order[:, :kept], prefix=state.prefix)
        return x + block.mlp(x), state
