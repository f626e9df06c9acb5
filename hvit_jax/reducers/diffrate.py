"""DiffRate: prune the least attended patches, merge the next ones, by counts that were learned."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ViTConfig
from hvit_jax.errors import unknown
from hvit_jax.fields import known, option, steps
from hvit_jax.models.block import Block
from hvit_jax.models.reducer import Layer, TokenState, initial_state, pool_by_size, pools_patches
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.matching import unit_vectors
from hvit_jax.ops.merging import sum_groups
from hvit_jax.ops.precision import accumulator, accurate_einsum
from hvit_jax.ops.selection import behind_prefix, best_places, descending_order
from hvit_jax.reducers.merging import (
    PROPORTIONAL,
    MergeState,
    Merging,
    counts_to_try,
    usual_count,
)

# A negative similarity can bring a weight to 0 or below, which has no logarithm and gives no mean.
_LEAST = 1e-6


@dataclass(frozen=True)
class DiffRateLayer(Layer):
    """A block that sorts its patches, of which `pruned` remain before the others merge."""

    pruned: int = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiffRateState(MergeState):
    """Trace, sizes, and what attention weighs tokens by.

    Attributes:
        weights: 1 for a token that nothing joined; of what joins a token its weight is added,
            times how similar both are.
    """

    weights: Float[Array, "B N"]


@dataclass(frozen=True)
class DiffRate(Merging):
    """Pruning and merging at rates that were searched for each block.

    Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
    ICCV, arXiv 2305.17997.

    How much each block should prune and merge depends on the block. The authors learned these
    counts on frozen weights; here they are given. Between attention and MLP of every block the
    patches are sorted by the attention that CLS pays them. Those behind the first `prune_kept`
    tokens are gone. Of the rest, those behind the first `merge_kept` each join the most similar of
    the tokens before them, by the cosine of the tokens themselves, as a plain mean. Attention
    weighs a token by a number that begins at 1 and grows by that of what joins it, times that
    cosine. CLS and registers neither merge nor go.

    `counts` names published counts by model and GFLOPs, such as ViT-B-DeiT:11.5; they are scaled to
    the grid of this model. `prune_kept` and `merge_kept` give others, one number a block, CLS
    counted. `r` merges the same number in every block.

    Differs from the original: that number is at least 1e-6 where its logarithm is taken or means
    are weighted by it, and without CLS the score is the mean attention from all patches.
    """

    name: ClassVar[str] = "diffrate"
    alone: ClassVar[str] = "its counts were searched for whole models"

    counts: str | None = option(
        None,
        "published counts, as MODEL:GFLOPS (default: of the model with as many blocks; r = 47% of "
        "the patches over the depth for other depths)",
    )
    prune_kept: tuple[int, ...] | None = option(
        None, "tokens that pruning keeps in each block, CLS included", least=2
    )
    merge_kept: tuple[int, ...] | None = option(
        None, "tokens that merging keeps in each block, CLS included", least=2
    )
    r: int | None = option(None, "tokens that merge in every block, in place of counts", least=0)
    weighted: bool = option(False, "merge to means weighted as attention is")
    pool_by_size: bool = pool_by_size()

    @classmethod
    def strengths(cls, config: ViTConfig) -> Iterable[DiffRate]:
        """Vary how many tokens merge in every block; see `Reducer.strengths`."""
        most = max(1, config.num_patches // config.depth)
        return (cls(r=round(share * most)) for share in (0, *steps()))

    @classmethod
    def candidates(cls, config: ViTConfig) -> Iterable[DiffRate]:
        """Try all published counts of a model with as many blocks; see `Reducer.candidates`."""
        usual = usual_counts(config)
        if usual is None:
            return (cls(r=count) for count in counts_to_try(config))
        model = usual.partition(":")[0]
        return (cls(counts=f"{model}:{target}") for target in published_counts()[model])

    def resolve(self, config: ViTConfig) -> DiffRate:
        """Fill in the counts of every block; see `Reducer.resolve`."""
        lists = self.prune_kept is not None or self.merge_kept is not None
        ways = sum((self.counts is not None, lists, self.r is not None))
        self.check(ways <= 1, "counts", "give one of counts, r, or prune_kept with merge_kept")
        if lists:
            both = self.prune_kept is not None and self.merge_kept is not None
            self.check(both, "merge_kept", "prune_kept and merge_kept go together")
            prune, merge = known(self.prune_kept), known(self.merge_kept)
        else:
            prune, merge = self._lists(config)
        least = _fewest(config)
        for name, kept in (("prune_kept", prune), ("merge_kept", merge)):
            resolved = dataclasses.replace(self, **{name: kept})
            wanted = f"one number for each of {config.depth} blocks"
            resolved.check(len(kept) == config.depth, name, wanted)
            resolved.check(min(kept) >= least, name, f"at least {least}")
        # The lists stand for what they came from, so that resolving once more changes nothing.
        return dataclasses.replace(self, counts=None, r=None, prune_kept=prune, merge_kept=merge)

    def _lists(self, config: ViTConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Find the counts that are not given as lists."""
        name = self.counts or (usual_counts(config) if self.r is None else None)
        if name is not None:
            return scaled_counts(name, config)
        r = usual_count(config) if self.r is None else self.r
        least = _fewest(config)
        kept = [max(least, config.num_tokens - r * block) for block in range(config.depth + 1)]
        return tuple(kept[:-1]), tuple(kept[1:])

    def schedule(self, config: ViTConfig) -> tuple[Layer, ...]:
        """As many tokens after every block as its counts say; see `Reducer.schedule`."""
        layers, tokens = [], config.num_tokens
        for prune, merge in zip(known(self.prune_kept), known(self.merge_kept), strict=True):
            pruned = min(tokens, prune)
            left = min(pruned, merge)
            # All weights are 1 before the first merge, and their logarithms 0.
            merged = any(layer.tokens_out < layer.pruned for layer in layers)
            layers.append(DiffRateLayer(tokens, left, PROPORTIONAL if merged else "sort", pruned))
            tokens = left
        return tuple(layers)

    def init(self, x: Float[Array, "B N C"], config: ViTConfig, *, trace: bool) -> DiffRateState:
        """Make the state before the first block; see `Reducer.init`."""
        ones = jnp.ones(x.shape[:2], accumulator(x.dtype))
        common = initial_state(x, config, trace=trace, by_image=True)
        return DiffRateState(**common, sizes=ones, weights=ones)

    def block(
        self, block: Block, x: Float[Array, "B N C"], state: DiffRateState, layer: Layer, draws: Any
    ) -> tuple[Float[Array, "B M C"], TokenState]:
        """Run attention, sort, prune, merge, then run the MLP; see `Reducer.block`."""
        assert isinstance(layer, DiffRateLayer)
        q, k, v = block.qkv(x, state.coordinates)
        weighs = layer.mode == PROPORTIONAL
        bias = jnp.log(jnp.maximum(state.weights, _LEAST)) if weighs else None
        attended, scores = block.attend_and_score_patches(
            q, k, v, prefix=state.prefix, key_bias=bias
        )
        x, state = self._keep(x + block.project(attended), scores, state, layer.pruned)
        if layer.tokens_out < layer.pruned:
            x, state = self._merge(x, state, layer.tokens_out)
        return x + block.mlp(x), state

    def _keep(self, x, scores, state: DiffRateState, tokens: int) -> tuple[Array, DiffRateState]:
        """Sort patches, and keep the first."""
        prefix = state.prefix
        order = descending_order(scores)
        kept = order[:, : tokens - prefix]
        held = behind_prefix(kept, prefix)
        state = dataclasses.replace(
            state.moved(x, best_places(order, prefix=prefix, keep=tokens - prefix)),
            sizes=gather(state.sizes, held),
            weights=gather(state.weights, held),
            coordinates=state.coordinates_of(kept),
        )
        return gather(x, held), state

    def _merge(self, x, state: DiffRateState, tokens: int) -> tuple[Array, DiffRateState]:
        """Let the tokens behind the first ones join those that they are most like."""
        prefix, wide = state.prefix, accumulator(x.dtype)
        similar, targets = _most_similar(x[:, prefix:], tokens - prefix)
        stay = jnp.broadcast_to(jnp.arange(tokens, dtype=targets.dtype), (x.shape[0], tokens))
        places = jnp.concatenate([stay, prefix + targets], axis=1)
        shares = jnp.concatenate([jnp.ones((x.shape[0], tokens), wide), similar], axis=1)
        grown = sum_groups(state.weights * shares, places, tokens=tokens)
        ones = jnp.ones_like(state.weights)
        weights = jnp.maximum(state.weights, _LEAST) if self.weighted else ones
        return state.merged(x, places, tokens=tokens, means_by=weights, weights=grown)

    def block_flops(self, config: ViTConfig, layer: Layer) -> int:
        """Count the block, its scores, the similarities and the means."""
        assert isinstance(layer, DiffRateLayer)
        before, after, width = layer.tokens_in, layer.tokens_out, config.width
        total = super().block_flops(config, layer) + before
        if not config.class_token:
            total += before**2
        if merged := layer.pruned - after:
            total += (layer.pruned + merged * after + after) * width + merged
        return total


def _fewest(config: ViTConfig) -> int:
    """Count the tokens that every block must keep: one patch, and two in all."""
    return max(2, config.prefix_tokens + 1)


def _most_similar(
    x: Float[Array, "B P C"], kept: int
) -> tuple[Float[Array, "B R"], Int[Array, "B R"]]:
    """Find for the patches behind the first ones which of these they are most like, by cosine."""
    unit = unit_vectors(x)
    similarity = accurate_einsum("brc,bkc->brk", unit[:, kept:], unit[:, :kept])
    return similarity.max(-1), similarity.argmax(-1).astype(jnp.int32)


@functools.cache
def published_counts() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Read the authors' counts, by model and GFLOPs; each has `prune_kept` and `merge_kept`."""
    text = importlib.resources.files("hvit_jax").joinpath("diffrate_counts.json").read_text("utf-8")
    return json.loads(text)


def usual_counts(config: ViTConfig) -> str | None:
    """Name the published counts that a model takes by default: of one with as many blocks, if any.

    Those of DeiT keep two patches in the end, so they are for heads that read CLS.
    """
    reads_patches = config.decoder is not None or pools_patches(config)
    base = "ViT-B-MAE:11.5" if reads_patches else "ViT-B-DeiT:11.5"
    return {12: base, 24: "ViT-L-MAE:38.5", 32: "ViT-H-MAE:103.4"}.get(config.depth)


def scaled_counts(name: str, config: ViTConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Scale published counts to the patches of a model.

    Args:
        name: model and GFLOPs, such as "ViT-B-DeiT:11.5".
        config: the model's sizes, with as many blocks.

    Returns:
        Tokens that pruning and merging keep in each block.

    Raises:
        InputError: for an unknown name.
    """
    model, _, target = name.partition(":")
    found = published_counts().get(model, {}).get(target)
    if found is None:
        names = [f"{each}:{at}" for each, all_at in published_counts().items() for at in all_at]
        raise unknown("diffrate: counts", name, names)
    reference = 256 if model == "ViT-H-MAE" else 196
    least = _fewest(config)

    def scale(kept: int) -> int:
        patches = round((kept - 1) * config.num_patches / reference)
        return max(least, config.prefix_tokens + patches)

    return tuple(map(scale, found["prune_kept"])), tuple(map(scale, found["merge_kept"]))
