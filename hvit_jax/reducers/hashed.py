"""What ACT and SMYRF share: a range of blocks whose attention runs on random hashes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option
from hvit_jax.models.reducer import Layer, Reducer


@dataclass(frozen=True)
class HashedAttention(Reducer):
    """Base of the methods that keep all tokens and change attention alone, by random hashes."""

    first_block: int | None = option(0, "first block that the method acts in, counted from 0")
    last_block: int | None = option(None, "last such block, inclusive (default: the model's last)")
    hash_seed: int = option(0, "seed of the random hashes, which are the same for all images")

    def block_range(self, config: ViTConfig) -> tuple[int, int]:
        """Fill in and check the first and the last block.

        Raises:
            InputError: if the model does not have these blocks, or the seed is out of range.
        """
        last = config.depth - 1
        start = config.depth // 2 if self.first_block is None else self.first_block
        stop = last if self.last_block is None else self.last_block
        self.check(0 <= start <= last, "first_block", f"the model's blocks are 0 to {last}")
        wanted = f"from first_block={start} to {last}, the model's last block"
        self.check(start <= stop <= last, "last_block", wanted)
        self.check(0 <= self.hash_seed < 2**32, "hash_seed", f"from 0 to {2**32 - 1}")
        return start, stop

    def active_blocks(self, config: ViTConfig) -> tuple[int, ...]:
        """List the blocks that the method acts in, in ascending order."""
        start, stop = self.block_range(config)
        return tuple(range(start, stop + 1))

    def active_layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Describe each of `active_blocks`; see `Reducer.schedule`."""
        raise NotImplementedError

    def block_draws(self, config: ViTConfig, key: jax.Array) -> Any:
        """Draw one block's random numbers from a key."""
        raise NotImplementedError

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """All tokens stay; blocks outside the range run without reduction."""
        active = dict(zip(self.active_blocks(config), self.active_layers(config), strict=True))
        tokens = config.num_tokens
        return tuple(active.get(block, Layer(tokens, tokens)) for block in range(config.depth))

    def draws(self, config: ViTConfig) -> tuple[Any, ...]:
        """Draw each active block's random numbers from the seed and the block's number."""
        active = self.active_blocks(config)
        # Drawn while tracing, so that a compiled model holds them as constants.
        with jax.ensure_compile_time_eval():
            key = jax.random.key(self.hash_seed, impl="threefry2x32")
            return tuple(
                self.block_draws(config, jax.random.fold_in(key, block))
                if block in active
                else None
                for block in range(config.depth)
            )
