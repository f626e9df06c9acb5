"""SMYRF: queries and keys attend inside clusters that random hashes make."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState
from hvit_jax.ops import flops
from hvit_jax.ops.clustered_attention import clustered_attention, straddling_attention
from hvit_jax.ops.hashing import ProjectionDraws, draw_projections, project_asymmetric
from hvit_jax.ops.sorting import numbers_of_parts
from hvit_jax.reducers.hashed import HashedAttention

MAX_ROUNDS = 1024


@dataclass(frozen=True)
class SMYRF(HashedAttention):
    """Attention inside clusters of sorted queries and keys.

    Daras et al. 2020, "SMYRF: Efficient Attention using Asymmetric Clustering", arXiv 2010.05315.

    A query takes most of its attention from the few keys that have a large inner product with it.
    Queries and keys are mapped (XBOX+) so that a large product means a small distance, projected on
    a random line, and sorted along it; both sorted lists are cut into equally many clusters, and a
    query sees only the keys in the cluster of its own number. Neighbours on one line need not be
    neighbours in space, so this repeats for `rounds` lines, and a softmax over the rounds'
    log-sum-exp joins their results. All tokens stay, and outside the range blocks run as usual.

    Differs from the original: clusters never straddle heads, images and rounds unless `straddle` is
    set, the last cluster of a list takes what is left, and the random lines stay the same, where
    the original redraws them at every forward pass.
    """

    name: ClassVar[str] = "smyrf"

    first_block: int | None = option(
        None, "first block with clustered attention, counted from 0 (default: depth / 2)"
    )
    rounds: int = option(32, "rounds of hashing, at most 1024")
    q_cluster_size: int = option(32, "queries in a cluster")
    k_cluster_size: int = option(32, "keys in a cluster; must give as many clusters")
    straddle: bool = option(
        False, "cut the joined list of all rounds, images and heads, as the original does"
    )

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[SMYRF]:
        """Vary the rounds, from 4 to 32, in all blocks; see `Reducer.strengths`."""
        size = min(32, config.num_tokens)
        for rounds in range(4, 33):
            yield cls(first_block=0, rounds=rounds, q_cluster_size=size, k_cluster_size=size)

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[SMYRF]:
        """Try few and many rounds; see `Reducer.candidates`."""
        size = min(32, config.num_tokens)
        return (cls(rounds=n, q_cluster_size=size, k_cluster_size=size) for n in (4, 16))

    def resolve(self, config: ViTConfig) -> SMYRF:
        """Fill in the blocks, and check all options; see `Reducer.resolve`."""
        self.check(1 <= self.rounds <= MAX_ROUNDS, "rounds", f"from 1 to {MAX_ROUNDS}")
        tokens = config.num_tokens
        for field in ("q_cluster_size", "k_cluster_size"):
            size = getattr(self, field)
            self.check(1 <= size <= tokens, field, f"from 1 to the model's {tokens} tokens")
        queries, keys = -(-tokens // self.q_cluster_size), -(-tokens // self.k_cluster_size)
        self.check(
            queries == keys,
            "k_cluster_size",
            f"cuts {tokens} keys into {keys} clusters, where q_cluster_size={self.q_cluster_size} "
            f"makes {queries}; the numbers must be equal",
        )
        equal = self.q_cluster_size == self.k_cluster_size
        self.check(
            equal or not self.straddle,
            "k_cluster_size",
            f"straddle needs it to equal q_cluster_size={self.q_cluster_size}",
        )
        first, last = self.block_range(config)
        return dataclasses.replace(self, first_block=first, last_block=last)

    def active_layers(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Keep all tokens; see `HashedAttention.active_layers`."""
        tokens = config.num_tokens
        return (Layer(tokens, tokens, "smyrf"),) * len(self.active_blocks(config))

    def block_draws(self, config: ViTConfig, key: jax.Array) -> ProjectionDraws:
        """Draw one block's random lines, shared by its heads."""
        return draw_projections(key, config.head_dim, self.rounds)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: TokenState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B N C"], TokenState]:
        """Run one block, in the range with clustered attention."""
        if draws is None:
            return block(x, state.coordinates), state
        attended = self._attend(block, *block.qkv(x, state.coordinates), draws)
        x = x + block.project(attended)
        return x + block.mlp(x), state

    def groups(
        self, block: Block, x: Float[Array, "B N C"], after: TokenState, layer: Layer, draws: Any
    ) -> Int[Array, "B P"]:
        """Name the cluster of every patch's query, in the first round and head."""
        if draws is None:
            return super().groups(block, x, after, layer, draws)
        q, k, _ = block.qkv(x, after.coordinates)
        q, k = (heads.array.swapaxes(1, 2)[:, :1] for heads in (q, k))
        projected = project_asymmetric(q, k, draws)[0][0, :, 0]
        return numbers_of_parts(projected, self.q_cluster_size)[:, after.prefix :]

    def _attend(self, block, q, k, v, draws):
        if self.straddle:
            q, k, v = (heads.array for heads in (q, k, v))
            return straddling_attention(q, k, v, draws, cluster_size=self.q_cluster_size)
        return clustered_attention(
            q,
            k,
            v,
            draws,
            q_cluster_size=self.q_cluster_size,
            k_cluster_size=self.k_cluster_size,
            attend=block.attend_in_clusters,
        )

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count one block: projections, attention inside clusters, and joining the rounds."""
        if layer.mode == "dense":
            return super().block_flops(config, layer)
        tokens, width, heads = layer.tokens_in, config.width, config.heads
        projections = 2 * tokens * (config.head_dim + 2) * heads
        clusters = tokens * self.k_cluster_size * (2 * width + 3 * heads)
        joining = tokens * (width + 6 * heads)
        return (
            flops.queries_keys_values(config, tokens)
            + self.rounds * (projections + clusters + joining)
            + flops.projection(config, tokens)
            + flops.mlp(config, tokens)
        )
