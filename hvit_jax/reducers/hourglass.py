"""Hourglass: cluster the patch tokens once, run the remaining blocks on the centroids."""

from __future__ import annotations

import dataclasses
import itertools
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
from hvit_jax.models.reducer import (
    Layer,
    Reducer,
    TokenState,
    initial_state,
    pool_by_size,
    pools_patches,
)
from hvit_jax.ops import flops
from hvit_jax.ops.clustering import cluster_labels, cluster_tokens, reconstruct_tokens


@dataclass(frozen=True)
class ClusterLayer(Layer):
    """A block that clusters a grid of patches to a grid of centroids before it runs.

    Attributes:
        grid: rows and columns of patches.
        clusters: rows and columns of centroids.
        counts: whether it is counted how many patches each centroid has.
    """

    grid: tuple[int, int] = (0, 0)
    clusters: tuple[int, int] = (0, 0)
    counts: bool = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HourglassState(TokenState):
    """Trace of the patches, and what reconstruction needs; None before clustering or untraced.

    Attributes:
        before: patch features right before clustering.
        centroids: centroids right after it, in float32.
        all_coordinates: of the whole grid, while `coordinates` are the centroids'.
        sizes: patches that are nearest to each centroid; None if they are not counted.
    """

    before: Float[Array, "B P C"] | None = None
    centroids: Float[Array, "B K C"] | None = None
    all_coordinates: Float[Array, "_ P 2"] | None = None
    sizes: Float[Array, "B K"] | None = None


@dataclass(frozen=True)
class Hourglass(Reducer):
    """Token clustering before one block.

    Liang et al. 2022, "Expediting Large-Scale Vision Transformer for Dense Prediction without
    Fine-tuning", arXiv 2210.01035.

    Neighbouring patches of a picture look alike, and after a few blocks so do their tokens. Before
    block `cluster_location` the h x w grid of patch tokens becomes a kh x kw grid of centroids: a
    soft k-means that starts from average pooling and in which a patch may join only centroids near
    its own place. CLS and registers are kept. All later blocks run on these and kh*kw tokens. For
    dense prediction `reconstruct_tokens` spreads the processed centroids over the grid again;
    classification reads CLS and needs no reconstruction. With `reconstruct_location` this happens
    inside the model: the blocks behind that one run on all patches again, as in the paper.
    """

    name: ClassVar[str] = "hourglass"
    restores_masks: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    cluster_location: int | None = option(
        None, "cluster before this block, counted from 0 (default: min(8, depth / 3))", short="-l"
    )
    num_clusters: int | tuple[int, int] | None = option(
        None,
        "centroids: a perfect square, or rows and columns (default: half the grid's sides)",
        short="-n",
    )
    cluster_iters: int = option(5, "iterations of the soft k-means", least=1)
    cluster_window: int = option(5, "side of the window of centroids that a patch may join; odd")
    cluster_temperature: float | str = option(
        1.0,
        "factor on the negative squared distance; auto: from the distances in each picture, for "
        "models of any scale",
        choices=("auto",),
        above=0,
        metavar="X|auto",
    )
    reconstruct_location: int | None = option(
        None,
        "put all patches back after this block, a later one than cluster_location (default: never)",
    )
    reconstruct_neighbors: int = option(
        3, "nearest centroids that a patch is reconstructed from; negative: all"
    )
    reconstruct_temperature: float | str = option(
        0.05,
        "factor on that negative squared distance; auto: as for clustering",
        choices=("auto",),
        above=0,
        metavar="X|auto",
    )
    reconstruct_normalize: str = option(
        "l2",
        "l2: a patch's weights have unit norm, as in the original; sum: they sum to 1, as the "
        "paper writes",
        choices=("l2", "sum"),
    )
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[Hourglass]:
        """Vary the grid of centroids; see `Reducer.strengths`."""
        for fraction in steps(max(config.grid)):
            yield cls(num_clusters=scaled_grid(config, fraction))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[Hourglass]:
        """Try three places and three grids of centroids; see `Reducer.candidates`."""
        places = config.blocks_at(1 / 6, 1 / 3, 1 / 2)
        for place, fraction in itertools.product(places, (0.5, 0.65, 0.8)):
            yield cls(cluster_location=place, num_clusters=scaled_grid(config, fraction))

    def resolve(self, config: ViTConfig) -> Hourglass:
        """Fill in location and cluster grid, a square as one number; see `Reducer.resolve`."""
        location, clusters = self.cluster_location, self.num_clusters
        if location is None:
            location = min(8, config.depth // 3)
        if clusters is None:
            clusters = (max(1, config.grid[0] // 2), max(1, config.grid[1] // 2))
        resolved = dataclasses.replace(self, cluster_location=location, num_clusters=clusters)
        resolved._check(config)
        rows, columns = resolved.cluster_grid
        return dataclasses.replace(resolved, num_clusters=rows**2) if rows == columns else resolved

    def _check(self, config: ViTConfig) -> None:
        last = config.depth - 1
        self.check(
            0 <= known(self.cluster_location) <= last,
            "cluster_location",
            f"the model's blocks are 0 to {last}",
        )
        odd = self.cluster_window >= 1 and self.cluster_window % 2 == 1
        self.check(odd, "cluster_window", "an odd number of at least 1")
        self._check_reconstruction(last)
        (kh, kw), (h, w) = self.cluster_grid, config.grid
        fits = 1 <= kh <= h and 1 <= kw <= w
        self.check(fits, "num_clusters", f"{kh} x {kw} does not fit the {h} x {w} grid of patches")

    def _check_reconstruction(self, last: int) -> None:
        first = known(self.cluster_location) + 1
        back = self.reconstruct_location
        wanted = (
            f"a block from {first}, behind cluster_location, to {last}"
            if first <= last
            else f"no block is left behind cluster_location={first - 1}"
        )
        self.check(back is None or first <= back <= last, "reconstruct_location", wanted)
        some = self.reconstruct_neighbors != 0
        self.check(some, "reconstruct_neighbors", "at least 1, or negative for all")

    @property
    def cluster_grid(self) -> tuple[int, int]:
        """Rows and columns of centroids.

        Raises:
            InputError: if a single number is not a perfect square.
        """
        clusters = known(self.num_clusters)
        if isinstance(clusters, tuple):
            return clusters
        side = max(1, round(max(0, clusters) ** 0.5))
        wanted = f"not a perfect square; the nearest is {side**2}, or give rows and columns"
        self.check(side**2 == clusters, "num_clusters", wanted)
        return side, side

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """All patches up to `cluster_location`, centroids from there on, or as far as is asked."""
        clusters, location = self.cluster_grid, known(self.cluster_location)
        full, reduced = config.num_tokens, math.prod(clusters) + config.prefix_tokens
        counts = self.pool_by_size and pools_patches(config)
        cluster = ClusterLayer(full, reduced, "cluster", config.grid, clusters, counts)
        before, inside = (Layer(full, full),) * location, Layer(reduced, reduced)
        if self.reconstruct_location is None:
            return (*before, cluster, *(inside,) * (config.depth - location - 1))
        between = (inside,) * (self.reconstruct_location - location - 1)
        behind = (Layer(full, full),) * (config.depth - self.reconstruct_location - 1)
        return (*before, cluster, *between, Layer(reduced, full, "reconstruct"), *behind)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> HourglassState:
        """Make the state before the first block; see `Reducer.init`."""
        return HourglassState(**initial_state(x, config, trace=trace))

    def block(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        state: HourglassState,
        layer: Layer,
        draws: Any,
    ) -> tuple[Float[Array, "B M C"], HourglassState]:
        """Run the block; cluster before it or reconstruct after it where that is its place."""
        if isinstance(layer, ClusterLayer):
            x, state = self._cluster(x, state, layer)
        x = block(x, state.coordinates)
        return self._reconstruct(x, state) if layer.mode == "reconstruct" else (x, state)

    def restore(
        self, tokens: Float[Array, "B N C"], state: HourglassState
    ) -> Float[Array, "B P C"]:
        """Reconstruct the grid from processed centroids; see `reconstruct_tokens`."""
        if state.centroids is None or state.before is None:
            return tokens[:, state.prefix :]
        return reconstruct_tokens(
            state.before,
            state.centroids,
            tokens[:, state.prefix :],
            k=self.reconstruct_neighbors,
            temperature=self.reconstruct_temperature,
            normalize=self.reconstruct_normalize,
        )

    def attended_source(
        self,
        block: Block,
        x: Float[Array, "B N C"],
        before: TokenState,
        after: TokenState,
        layer: Layer,
    ) -> Int[Array, "B P"] | None:
        """See `Reducer.attended_source`; a block that clusters attends to its centroids."""
        return after.source if isinstance(layer, ClusterLayer) else before.source

    def _cluster(self, x, state: HourglassState, layer: ClusterLayer):
        patches, places = x[:, state.prefix :], state.coordinates
        centroids, coordinates = cluster_tokens(
            patches,
            grid=layer.grid,
            clusters=layer.clusters,
            window=self.cluster_window,
            iters=self.cluster_iters,
            temperature=self.cluster_temperature,
            places=places,
        )
        traced = state.source is not None
        labels = cluster_labels(patches, centroids) if traced or layer.counts else None
        changed: dict[str, Any] = {"coordinates": coordinates, "all_coordinates": places}
        if traced and labels is not None:
            changed["source"] = labels + state.prefix
        if layer.counts and labels is not None:
            numbers = jnp.arange(centroids.shape[1]).reshape(1, 1, -1)
            changed["sizes"] = (labels[..., None] == numbers).sum(1, dtype=centroids.dtype)
        if traced or self.reconstruct_location is not None:
            changed.update(before=patches, centroids=centroids)
        x = jnp.concatenate([x[:, : state.prefix], centroids.astype(x.dtype)], axis=1)
        return x, dataclasses.replace(state, **changed)

    def _reconstruct(self, x, state: HourglassState):
        patches = self.restore(x, state)
        x = jnp.concatenate([x[:, : state.prefix], patches], axis=1)
        source, dropped = state.source, state.dropped
        if source is not None:
            source = jnp.broadcast_to(jnp.arange(state.prefix, x.shape[1]), source.shape)
            source, dropped = source.astype(jnp.int32), jnp.zeros_like(patches)
        return x, HourglassState(source, dropped, state.all_coordinates, state.prefix)

    def patch_sizes(
        self, x: Float[Array, "B N C"], state: HourglassState
    ) -> Float[Array, "B M"] | None:
        """Count the patches of every centroid; see `Reducer.patch_sizes`."""
        return state.sizes

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, clustering before it and reconstruction after it."""
        tokens = _inside(layer)
        total = flops.block(config, tokens, tokens)
        patches, clusters = config.num_patches, tokens - config.prefix_tokens
        width = config.width
        pairs = patches * clusters
        distances = (patches + clusters + pairs) * width + 3 * pairs
        if isinstance(layer, ClusterLayer):
            update = pairs * (2 + 5 + width) + clusters * width
            total += 3 * pairs + self.cluster_iters * (distances + update)
            total += distances * (self.cluster_temperature == "auto")
        elif layer.mode == "reconstruct":
            total += flops.nearest_sums(config, patches, clusters, width)
        return total

    def restore_flops(self, config: ViTConfig, channels: int) -> int:
        """Count the reconstruction of the grid; see `Reducer.restore_flops`."""
        if self.reconstruct_location is not None:
            return 0
        return flops.nearest_sums(
            config, config.num_patches, math.prod(self.cluster_grid), channels
        )

    def encoder_dropout_flops(self, config: ViTConfig) -> int:
        """Count dropout once a block, as the tables do for this method."""
        return sum(_inside(layer) for layer in self.schedule(config)) * config.width


def scaled_grid(config: ViTConfig, fraction: float) -> tuple[int, int]:
    """Scale the sides of the grid of patches; each is 1 at least."""
    rows, columns = config.grid
    return max(1, round(fraction * rows)), max(1, round(fraction * columns))


def _inside(layer: Layer) -> int:
    """Count the tokens that attention and MLP of a block run on."""
    return layer.tokens_out if isinstance(layer, ClusterLayer) else layer.tokens_in
