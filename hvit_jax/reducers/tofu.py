"""ToFu: drop matched tokens in early blocks, merge them in late ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from hvit_jax.config import ViTConfig
from hvit_jax.fields import known, option
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, pool_by_size
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.matching import Matching, match_tokens, most_merges
from hvit_jax.ops.merging import average_tokens, drop_places, drop_tokens, sum_groups
from hvit_jax.ops.precision import accumulator
from hvit_jax.reducers.merging import ByRatio, MergeState, Merging, attend_and_compare

_LEAST = 1e-6  # Of a norm that is divided by.


@dataclass(frozen=True)
class ToFu(ByRatio, Merging):
    """Token fusion: dropping first, merging that keeps norms later.

    Kim et al. 2024, "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV,
    arXiv 2312.01026.

    What a block makes of the mean of two tokens is the mean of what it makes of each only if it is
    nearly linear, which late blocks are and early ones are not. Tokens are matched as in ToMe:
    between attention and MLP they are split in two by turns, and those of the first half that are
    most like one of the second, by the cosine of their keys, leave. In the first `prune_blocks`
    they are dropped. In later blocks they merge by MLERP: the plain mean of two vectors is shorter
    than they are, so it is scaled to the largest norm of its parts. Attention and means know no
    sizes. CLS and registers neither merge nor go.

    How many leave follows from `ratio`, the part of the tokens that remains after each block, or
    from `r`, as in ToMe.

    Differs from the paper: the block's number stands for its test of linearity, and, as in both
    re-implementations that were compared, the mean is scaled by the largest norm over the receiving
    token's norm, not over its own; `norm="mean"` gives the paper's.
    """

    name: ClassVar[str] = "tofu"

    prune_blocks: int | None = option(
        None, "first blocks, which drop instead of merging (default: depth / 2 + 1)", least=0
    )
    fuse: str = option(
        "mlerp",
        "how later blocks merge: mlerp keeps norms, mean does not",
        choices=("mlerp", "mean"),
    )
    norm: str = option(
        "receiver",
        "what mlerp divides by: the receiving token's norm, or the mean's",
        choices=("receiver", "mean"),
    )
    pool_by_size: bool = pool_by_size()

    def resolve(self, config: ViTConfig) -> ToFu:
        """Fill in ratio and dropping blocks, and check all options; see `Reducer.resolve`."""
        prune = config.depth // 2 + 1 if self.prune_blocks is None else self.prune_blocks
        self.check(prune <= config.depth, "prune_blocks", f"the model has {config.depth} blocks")
        resolved = dataclasses.replace(self, prune_blocks=prune)
        return super(ToFu, resolved).resolve(config)

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every block that drops or merges."""
        layers, tokens = [], config.num_tokens
        for block in range(config.depth):
            most = most_merges(tokens, prefix=config.prefix_tokens)
            left = tokens - self.leaving(config, block, tokens=tokens, most=most)
            mode = "prune" if block < known(self.prune_blocks) else "fuse"
            layers.append(Layer(tokens, left, mode if left < tokens else "dense"))
            tokens = left
        return tuple(layers)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: MergeState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run attention, drop or merge, then run the MLP; see `Reducer.block`."""
        if layer.mode == "dense":
            return block(x, state.coordinates), state
        x, metric = attend_and_compare(block, x, state.coordinates)
        r, prunes = layer.tokens_in - layer.tokens_out, layer.mode == "prune"
        matching = match_tokens(metric, r=r, prefix=state.prefix, dtype=x.dtype)
        places = drop_places(matching) if prunes else matching.places
        sizes = sum_groups(state.sizes, places, tokens=layer.tokens_out)
        coordinates = state.coordinates_of_all(x.shape[0])
        if coordinates is not None:
            reduce = drop_tokens if prunes else average_tokens
            coordinates = reduce(coordinates, matching)[:, state.prefix :]
        state = state.moved(x, places)
        x = drop_tokens(x, matching) if prunes else self._fuse(x, matching)
        state = dataclasses.replace(state, sizes=sizes, coordinates=coordinates)
        return x + block.mlp(x), state

    def _fuse(self, x, matching: Matching):
        if self.fuse == "mlerp":
            return mlerp(x, matching, norm=self.norm)
        return average_tokens(x, matching)

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, the similarities and what merging takes."""
        before, total = layer.tokens_in, super().block_flops(config, layer)
        if layer.tokens_out < before:
            odd = before // 2
            total += (before + (before - odd) * odd) * config.head_dim
            if layer.mode == "fuse":
                total += (before + 3 * odd if self.fuse == "mlerp" else odd) * config.width
        return total


def mlerp(
    x: Float[Array, "B N C"], matching: Matching, *, norm: str = "receiver"
) -> Float[Array, "B M C"]:
    """Merge matched tokens to plain means, scaled after the largest norm of their parts.

    Args:
        x: tokens.
        matching: which of them merge.
        norm: what the largest norm is divided by: that of the "receiver", the token that the others
            join, or the "mean"'s own, which gives the result exactly the largest norm.
    """
    wide, targets = accumulator(x.dtype), matching.targets
    norms, merged = jnp.linalg.norm(x.astype(wide), axis=-1), average_tokens(x, matching)
    receivers = norms[:, matching.apart + 1 :: 2]
    left = merged.shape[1] - receivers.shape[1]
    leaving = gather(norms, matching.leaving)
    joins = targets[:, None, :] == jnp.arange(receivers.shape[1])[None, :, None]
    largest = jnp.maximum(receivers, jnp.where(joins, leaving[:, None, :], 0).max(-1))
    fused = merged[:, left:].astype(wide)
    own = jnp.linalg.norm(fused, axis=-1) if norm == "mean" else receivers
    factor = jnp.where(joins.any(-1), largest / jnp.maximum(own, _LEAST), 1)
    return jnp.concatenate([merged[:, :left], (fused * factor[..., None]).astype(x.dtype)], axis=1)
