"""ACT: queries that hash alike share one row of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, initial_state
from hvit_jax.ops import flops
from hvit_jax.ops.grouping import Groups, copy_to_members, group_tokens
from hvit_jax.ops.hashing import HashDraws, draw_hashes
from hvit_jax.ops.precision import accumulator
from hvit_jax.reducers.budgeted import Budgeted
from hvit_jax.reducers.hashed import HashedAttention

MAX_HASHES = 32


@dataclass(frozen=True)
class ActLayer(Layer):
    """A block that attends with cluster means; `clusters` is its budget a head."""

    clusters: int = 0


class ActDraws(NamedTuple):
    """One block's random hashes, shared by its heads; None for what is not clustered."""

    queries: HashDraws | None
    keys: HashDraws | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActState(TokenState):
    """Trace of the patches, and how many clusters were found.

    Attributes:
        over_budget: clusterings, one a block and head, that had to merge clusters so far.
        clusters: in the last block that clustered, the clusters of the head with most of them,
            before any were merged.
    """

    over_budget: Float[Array, " B"]
    clusters: Int[Array, " B"]


@dataclass(frozen=True)
class ACT(HashedAttention, Budgeted):
    """Attention for means of queries that hash alike (Adaptive Clustering Transformer).

    Zheng et al. 2020, "End-to-End Object Detection with Adaptive Clustering Transformer", arXiv
    2011.09315, as the Hourglass paper applies it to classification.

    Many tokens of a picture ask nearly the same question. Per image and head, queries are hashed:
    projected on `q_hashes` random lines, each cut into bins of width 8. Queries that fall into the
    same bins everywhere form a cluster; attention is computed for the clusters' mean queries, and
    every member takes the result of its cluster. More hashes make more and tighter clusters. With
    `group_keys` keys and values are clustered too, and a mean key counts as often as it has
    members. All tokens stay, and outside the range blocks run as usual.

    How many clusters there are depends on the image, so `max_clusters` sets a budget; where hashes
    make more, neighbouring clusters in hash order are merged evenly. `hvit calibrate`
    measures good budgets, and `Reducer.report` counts the clusterings that were over theirs.

    Differs from the original: it has no budget, and redraws its hashes at every forward pass.
    """

    name: ClassVar[str] = "act"
    budget_option: ClassVar[str] = "max_clusters"

    group_queries: bool = option(True, "cluster the queries")
    q_hashes: int = option(24, "hashes of a query, at most 32")
    group_keys: bool = option(False, "cluster keys and values too")
    k_hashes: int = option(32, "hashes of a key, at most 32")
    max_clusters: int | tuple[int, ...] | None = option(
        None, "clusters a head, or a list of them for each block (default: as many as tokens)"
    )

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[ACT]:
        """Vary the budget, down to a quarter of the tokens; see `Reducer.strengths`."""
        tokens = config.num_tokens
        return (cls(max_clusters=max(2, round(f * tokens))) for f in steps() if f >= 0.25)

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[ACT]:
        """Try few and many hashes; see `Reducer.candidates`."""
        return (cls(q_hashes=hashes) for hashes in (16, 24))

    def resolve(self, config: ViTConfig) -> ACT:
        """Fill in blocks and budgets, and check all options; see `Reducer.resolve`."""
        for field in ("q_hashes", "k_hashes"):
            self.check(1 <= getattr(self, field) <= MAX_HASHES, field, f"from 1 to {MAX_HASHES}")
        first, last = self.block_range(config)
        self.check_budgets(config)
        budgets = config.num_tokens if self.max_clusters is None else self.max_clusters
        return dataclasses.replace(self, first_block=first, last_block=last, max_clusters=budgets)

    def active_blocks(self, config: ViTConfig) -> tuple[int, ...]:
        """List the blocks that cluster; none if neither queries nor keys are clustered."""
        return super().active_blocks(config) if self.group_queries or self.group_keys else ()

    def active_layers(self, config: ViTConfig) -> tuple[ActLayer, ...]:
        """Give each block its budget; see `HashedAttention.active_layers`."""
        tokens = config.num_tokens
        return tuple(ActLayer(tokens, tokens, "act", budget) for budget in self.budgets(config))

    def block_draws(self, config: ViTConfig, key: jax.Array) -> ActDraws:
        """Draw one block's hashes."""
        size, (q_key, k_key) = config.head_dim, jax.random.split(key)
        return ActDraws(
            draw_hashes(q_key, size, self.q_hashes) if self.group_queries else None,
            draw_hashes(k_key, size, self.k_hashes) if self.group_keys else None,
        )

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> ActState:
        """Make the state before the first block; see `Reducer.init`."""
        return ActState(
            **initial_state(x, config, trace=trace),
            over_budget=jnp.zeros(x.shape[0], jnp.float32),
            clusters=jnp.zeros(x.shape[0], jnp.int32),
        )

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: ActState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B N C"], ActState]:
        """Run one block, in the range on cluster means."""
        if not isinstance(layer, ActLayer):
            return block(x, state.coordinates), state
        apart = "qkv" if self.group_keys else "q"
        q, k, v = block.qkv(x, state.coordinates, apart=apart)
        queries, keys = self._cluster(q, k, layer, draws)
        means, bias = q if queries is None else block.average_groups(q, queries), None
        if keys is not None:
            k, v = block.average_groups(k, keys), block.average_groups(v, keys)
            # As if each mean stood there as often as it has members.
            bias = jnp.log(keys.counts.astype(accumulator(k.dtype)))
        attended = block.attend(means, k, v, key_bias=bias)
        if queries is not None:
            attended = copy_to_members(attended, queries)
        x = x + block.project(attended)
        return x + block.mlp(x), _counted(state, layer, queries, keys)

    def groups(
        self, block: Block, x: Float[Array, "B N C"], after: ActState, layer: Layer, draws: Any
    ) -> Int[Array, "B P"]:
        """Name the cluster of every patch's query, or key, in the first head."""
        if not isinstance(layer, ActLayer):
            return super().groups(block, x, after, layer, draws)
        q, k, _ = block.qkv(x, after.coordinates)
        clusterings = self._cluster(q, k, layer, draws)
        found = next(each for each in clusterings if each is not None)
        return found.members[:, 0, after.prefix :]

    def _cluster(self, q, k, layer: ActLayer, draws: ActDraws) -> tuple[Groups | None, ...]:
        """Group queries and keys; queries are hashed after attention's scaling, keys as they are.

        None stands for what is not grouped.
        """
        return (
            _group(q.array, draws.queries, layer, scale=q.shape[-1] ** -0.5),
            _group(k.array, draws.keys, layer),
        )

    def report(self, state: ActState) -> dict[str, Float[Array, " B"]]:
        """Tell which images went over budget, and count their clusterings, one a block and head."""
        return {
            "act_images_over_budget": jnp.minimum(state.over_budget, 1),
            "act_over_budget_heads": state.over_budget,
        }

    def budget_blocks(self, config: ViTConfig) -> tuple[int, ...]:
        """List the blocks that cluster."""
        return self.active_blocks(config)

    def counts(self, state: ActState) -> dict[str, Int[Array, "B S"]]:
        """Count the clusters of the head that has most; see `Budgeted.counts`."""
        return {"clusters": state.clusters[:, None]}

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count one block as if it found as many clusters as its budget allows."""
        if not isinstance(layer, ActLayer):
            return super().block_flops(config, layer)
        tokens, width, heads = layer.tokens_in, config.width, config.heads
        queries = layer.clusters if self.group_queries else tokens
        keys = layer.clusters if self.group_keys else tokens
        core = queries * keys * (2 * width + 6 * heads)
        if self.group_keys:  # weights times counts, and renormalised
            core += 2 * heads * queries * keys
        hashes = self.q_hashes * self.group_queries + self.k_hashes * self.group_keys
        scaling_and_hashing = tokens * width * (1 + hashes)
        return (
            flops.queries_keys_values(config, tokens)
            + scaling_and_hashing
            + core
            + flops.projection(config, tokens)
            + flops.mlp(config, tokens)
        )


def _group(x, draws: HashDraws | None, layer: ActLayer, *, scale: float = 1.0) -> Groups | None:
    if draws is None:
        return None
    return group_tokens(x, draws, max_groups=layer.clusters, scale=scale)


def _counted(state: ActState, layer: ActLayer, *clusterings: Groups | None) -> ActState:
    """Add a block's clusterings to the state."""
    found = jnp.stack([groups.distinct for groups in clusterings if groups is not None], axis=-1)
    over = (found > layer.clusters).sum((1, 2), dtype=jnp.float32)
    return dataclasses.replace(
        state, over_budget=state.over_budget + over, clusters=found.max((1, 2))
    )
