"""Pool: the baseline that replaces patches by the averages of a coarser grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, Reducer, TokenState, initial_state, pool_by_size
from hvit_jax.ops.clustering import initial_labels, pool_tokens
from hvit_jax.reducers.hourglass import scaled_grid


@dataclass(frozen=True)
class PoolLayer(Layer):
    """A block before which a grid of patches is averaged to a coarser one."""

    grid: tuple[int, int] = (0, 0)
    pooled: tuple[int, int] = (0, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PoolState(TokenState):
    """Trace of the patches, and how many of them each token stands for.

    Attributes:
        sizes: patches of every patch token, 1 for those before them; None before pooling.
    """

    sizes: Float[Array, "B N"] | None = None


@dataclass(frozen=True)
class Pool(Reducer):
    """Average pooling before one block: a baseline.

    Before block `pool_location` the h x w grid of patches becomes the kh x kw averages of its
    cells, as adaptive average pooling has them. It is Hourglass without its clustering, so that the
    difference between the two is what clustering is worth. CLS and registers are kept. A patch is
    restored as the cell that holds its place.
    """

    name: ClassVar[str] = "pool"
    needs_grid: ClassVar[bool] = True
    baseline: ClassVar[bool] = True

    pool_location: int | None = option(
        None, "pool before this block, counted from 0 (default: min(8, depth / 3))"
    )
    grid: tuple[int, int] | None = option(
        None, "rows and columns that remain (default: half the grid's sides)", least=1
    )
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[Pool]:
        """Vary the grid; see `Reducer.strengths`."""
        return (cls(grid=scaled_grid(config, fraction)) for fraction in steps(max(config.grid)))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[Pool]:
        """Try three places and three grids; see `Reducer.candidates`."""
        for place in config.blocks_at(1 / 6, 1 / 3, 1 / 2):
            for fraction in (0.5, 0.65, 0.8):
                yield cls(pool_location=place, grid=scaled_grid(config, fraction))

    def resolve(self, config: ViTConfig) -> Pool:
        """Fill in location and grid; see `Reducer.resolve`."""
        location, grid, last = self.pool_location, self.grid, config.depth - 1
        location = min(8, config.depth // 3) if location is None else location
        if grid is None:
            grid = (max(1, config.grid[0] // 2), max(1, config.grid[1] // 2))
        resolved = dataclasses.replace(self, pool_location=location, grid=grid)
        inside = 0 <= location <= last
        resolved.check(inside, "pool_location", f"the model's blocks are 0 to {last}")
        fits = all(side <= whole for side, whole in zip(grid, config.grid, strict=True))
        resolved.check(
            fits, "grid", "it does not fit the {} x {} grid of patches".format(*config.grid)
        )
        return resolved

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """All patches before `pool_location`, the averages from there on."""
        full, location, grid = config.num_tokens, known(self.pool_location), known(self.grid)
        if grid == config.grid:
            return (Layer(full, full),) * config.depth
        left = config.prefix_tokens + math.prod(grid)
        pool = PoolLayer(full, left, "pool", config.grid, grid)
        behind = (Layer(left, left),) * (config.depth - location - 1)
        return (*(Layer(full, full),) * location, pool, *behind)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> PoolState:
        """Make the state before the first block; see `Reducer.init`."""
        return PoolState(**initial_state(x, config, trace=trace))

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: PoolState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], PoolState]:
        """Run the block; pool before it where that is its place."""
        if isinstance(layer, PoolLayer):
            x, state = self._pool(x, state, layer)
        return block(x, state.coordinates), state

    def _pool(self, x, state: PoolState, layer: PoolLayer) -> tuple[Array, PoolState]:
        prefix, sizes = state.prefix, {"grid": layer.grid, "clusters": layer.pooled}
        pooled = pool_tokens(x[:, prefix:], **sizes).astype(x.dtype)
        rows, columns = initial_labels(layer.grid, layer.pooled).T
        cells = rows * layer.pooled[1] + columns
        counts = np.bincount(cells, minlength=math.prod(layer.pooled))
        counts = np.concatenate([np.ones(prefix), counts])
        places = np.concatenate([np.arange(prefix), prefix + cells])
        state = state.moved(x, jnp.broadcast_to(jnp.asarray(places, jnp.int32), x.shape[:2]))
        coordinates = state.coordinates
        if coordinates is not None:
            coordinates = pool_tokens(coordinates, **sizes)
        counted = jnp.broadcast_to(jnp.asarray(counts, jnp.float32), (x.shape[0], counts.size))
        state = dataclasses.replace(state, coordinates=coordinates, sizes=counted)
        return jnp.concatenate([x[:, :prefix], pooled], axis=1), state

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: TokenState,
        after: TokenState,
        layer: Layer,
    ) -> Int[Array, "B P"] | None:
        """See `Reducer.attended_source`; a block that pools attends to averages."""
        return after.source

    def patch_sizes(self, x: Float[Array, "B N C"], state: PoolState) -> Float[Array, "B M"] | None:
        """Count the patches whose places each cell holds; see `Reducer.patch_sizes`."""
        if state.sizes is None or not self.pool_by_size:
            return None
        return state.sizes[:, state.prefix :]

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block on what is left; pooling is a reduction, and free."""
        tokens = layer.tokens_out
        return super().block_flops(config, dataclasses.replace(layer, tokens_in=tokens))
