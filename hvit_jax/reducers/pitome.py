"""PiToMe: merge the tokens that many others are like, and protect the rare ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.fields import option
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, pool_by_size
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.matching import match_tokens, unit_vectors
from hvit_jax.ops.precision import accurate_einsum
from hvit_jax.ops.selection import behind_prefix, descending_order
from hvit_jax.ops.sorting import inverse
from hvit_jax.reducers.merging import (
    ByRatio,
    MergeState,
    Merging,
    attend_and_compare,
    log_sizes,
    merging_mode,
)


@dataclass(frozen=True)
class PiToMeLayer(Layer):
    """A block that merges by energy.

    Attributes:
        margin: similarity from which another token counts in full.
        protects: whether only the tokens of highest energy can merge.
    """

    margin: float = 0.0
    protects: bool = False


@dataclass(frozen=True)
class PiToMe(ByRatio, Merging):
    """Token merging that protects what is rare in a picture.

    Tran et al. 2024, "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS,
    arXiv 2405.16148.

    A patch of sky is like many others, a small object like none. Between attention and MLP of every
    block each patch gets an energy: its mean similarity to all patches, by the cosine of their
    attention keys, where only what exceeds a margin counts in full and what is below it counts
    against the patch. The margin falls from block to block. Patches are sorted by energy, those
    first that many others are like. In blocks that protect, only the first 2r of this order can
    merge: they take turns, and every other one joins the most similar of the rest. In
    `bipartite_blocks` all patches take turns, and the `r` best pairs merge, as in ToMe. A merged
    token is the mean of its parts, weighted by how many input tokens each stands for. CLS and
    registers never merge.

    How many leave follows from `ratio`, the part of the patches that remains after each block, or
    from `r`, as in ToMe.

    Differs from the paper, as the official code does: similarities above the margin count by what
    exceeds it. The first half of the blocks is bipartite, and attention knows no sizes;
    `bipartite_blocks="none"` and `proportional_attention` give the paper's.
    """

    name: ClassVar[str] = "pitome"

    margin: float = option(0.75, "similarity from which others count in full, in the first block")
    alpha: float = option(1.0, "how much dissimilar tokens count against a token", least=0)
    bipartite_blocks: str = option(
        "first_half",
        "blocks in which all patches can merge; in the others the rare ones are protected",
        choices=("first_half", "last_half", "none", "all"),
    )
    proportional_attention: bool = option(
        False, "weigh attention to a token by how many input tokens it stands for"
    )
    pool_by_size: bool = pool_by_size()

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """Fewer tokens after every block that merges."""
        layers, tokens, half = [], config.num_tokens, -(-config.depth // 2)
        bipartite = {
            "first_half": range(half),
            "last_half": range(half, config.depth),
            "none": range(0),
            "all": range(config.depth),
        }[self.bipartite_blocks]
        for block in range(config.depth):
            patches = tokens - config.prefix_tokens
            left = tokens - self.leaving(config, block, tokens=patches, most=patches // 2)
            mode = merging_mode(config, tokens, left, weighed=self.proportional_attention)
            if left < tokens:
                margin = self.margin * (1 - block / config.depth)
                layers.append(PiToMeLayer(tokens, left, mode, margin, block not in bipartite))
            else:
                layers.append(Layer(tokens, left, mode))
            tokens = left
        return tuple(layers)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: MergeState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run attention, merge, then run the MLP; see `Reducer.block`."""
        bias = log_sizes(state, layer)
        x, metric = attend_and_compare(block, x, state.coordinates, key_bias=bias)
        if isinstance(layer, PiToMeLayer):
            metric, r = metric[:, state.prefix :], layer.tokens_in - layer.tokens_out
            energy = energies(metric, margin=layer.margin, alpha=self.alpha)
            places = match_by_energy(metric, energy, r=r, protects=layer.protects)
            places = behind_prefix(places, state.prefix)
            x, state = state.merged(x, places, tokens=layer.tokens_out)
        return x + block.mlp(x), state

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, all similarities, energies and means."""
        before, after = layer.tokens_in, layer.tokens_out
        total = super().block_flops(config, layer)
        if after < before:
            patches = before - config.prefix_tokens
            total += (patches + patches**2) * config.head_dim + 2 * patches**2
            total += (before + after) * config.width
        return total


def energies(metric: Float[Array, "B P D"], *, margin: float, alpha: float) -> Float[Array, "B P"]:
    """Measure how many tokens each token is like: the mean of its similarities beyond a margin.

    Args:
        metric: what similarity is measured on.
        margin: of the cosine; one that is less by d counts `alpha * (exp(-d) - 1)`, below 0.
        alpha: see there.

    Returns:
        Energies in float32; no gradient flows into them.
    """
    unit = unit_vectors(metric)
    beyond = accurate_einsum("bnd,bmd->bnm", unit, unit) - margin
    below = alpha * (jnp.exp(jnp.minimum(beyond, 0)) - 1)
    return jnp.where(beyond > 0, beyond, below).mean(-1)


def match_by_energy(
    metric: Float[Array, "B P D"], energy: Float[Array, "B P"], *, r: int, protects: bool
) -> Int[Array, "B P"]:
    """Match patches in the order of their energies, the highest first.

    Args:
        metric: what similarity is measured on.
        energy: of each patch.
        r: how many join another.
        protects: whether only the first 2r can; half of these join one of the other half.

    Returns:
        The number of the patch that each becomes a part of: first those that are protected, then
        as `match_tokens` has it.
    """
    order, patches = descending_order(energy), metric.shape[1]
    merging = 2 * r if protects else patches
    joined = match_tokens(gather(metric, order[:, :merging]), r=r, prefix=0).places
    safe = jnp.arange(patches - merging, dtype=joined.dtype)
    safe = jnp.broadcast_to(safe, (metric.shape[0], safe.size))
    places = jnp.concatenate([safe.shape[1] + joined, safe], axis=1)
    return gather(places, inverse(order))
