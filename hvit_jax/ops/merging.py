"""Token merging by bipartite soft matching (Bolya et al. 2023, ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import gather, pad_end
from hvit_jax.ops.precision import accumulator, accurate_einsum
from hvit_jax.ops.selection import behind_prefix
from hvit_jax.ops.sorting import order_and_ranks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matching:
    """Which tokens merge, and where every token goes.

    The first tokens may stand apart. Of the others, set A holds those at even positions, set B
    those at odd ones. The new sequence is what stands apart, the kept tokens of A, then all of B.

    Attributes:
        sources: where each token of the new sequence stood.
        leaving: positions of the tokens that merge, most similar first.
        targets: the token that each of these joins, counted within B.
        places: the new position of every token.
        apart: how many stand apart; even.
    """

    sources: Int[Array, "B M"]
    leaving: Int[Array, "B R"]
    targets: Int[Array, "B R"]
    places: Int[Array, "B N"]
    apart: int = dataclasses.field(metadata={"static": True})


def unit_vectors(x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """Scale vectors to unit length in float32, for cosines; no gradient flows through it."""
    x = jax.lax.stop_gradient(x.astype(accumulator(x.dtype)))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def merge_counts(
    r: int | Sequence[int | float], blocks: int, *, method: str = "tome"
) -> tuple[int, ...]:
    """Spell out how many tokens each block is asked to merge.

    Args:
        r: a number for all blocks; one a block, with 0 for those left out at the end; or
            (r, inflection), two entries of which the second is a float: a linear schedule of mean
            `r` that rises for an inflection above 0 (1.0: from 0 to 2r) and falls below 0.
        blocks: blocks of the model.
        method: whose `r` it is, for errors.

    Returns:
        One number a block.

    Raises:
        InputError: for a negative number, more numbers than blocks, or an inflection outside
            -1 to 1, which would ask for negative numbers.
    """
    counts = (r,) * blocks if isinstance(r, int) else tuple(r)
    if len(counts) == 2 and isinstance(counts[1], float):
        mean, inflection = counts
        if not -1 <= inflection <= 1:
            raise InputError(f"{method}: r={r!r}: the inflection must be between -1 and 1")
        first = int(mean * (1 - inflection))
        step = (2 * mean - 2 * first) / max(1, blocks - 1)
        counts = tuple(int(first + step * block) for block in range(blocks))
    if len(counts) > blocks:
        raise InputError(f"{method}: r lists {len(counts)} numbers, the model has {blocks} blocks")
    if min(counts, default=0) < 0:
        point = len(counts) == 2 and "; an inflection needs a point, such as (8, -1.0)"
        raise InputError(
            f"{method}: r={r!r}: merged tokens a block must be at least 0{point or ''}"
        )
    return tuple(map(int, counts)) + (0,) * (blocks - len(counts))


def most_merges(tokens: int, *, prefix: int = 1) -> int:
    """Count the tokens that one block can merge: half of those behind the prefix."""
    return (tokens - prefix) // 2


def match_tokens(metric: Float[Array, "B N D"], *, r: int, prefix: int = 1) -> Matching:
    """Choose `r` pairs of similar tokens, each of one token of A and one of B.

    Every token of A proposes to the token of B of highest cosine similarity, and the `r` best
    proposals win. Several tokens may join the same one. Of equal similarities the lower position
    wins. No gradient flows into the choice.

    Args:
        metric: what similarity is measured on, of at least two tokens; taken in float32 whatever
            its dtype, since rounded similarities of tokens that are alike would often tie.
        r: tokens to merge, capped to `most_merges`.
        prefix: tokens in front that never merge, such as a class token. With an odd number, kept
            tokens stay in ascending order; else they come in descending similarity.

    Returns:
        The matching; merging, sizes, tracing and unmerging all read it.
    """
    tokens = metric.shape[1]
    r = min(r, most_merges(tokens, prefix=prefix))
    # Of the prefix an even number stands apart, so that one at most is in A, and none in B.
    class_token = prefix % 2
    apart = prefix - class_token
    best, partner = _proposals(metric[:, apart:])
    here = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
    if class_token:
        best = jnp.where(here == 0, -jnp.inf, best)
    order, rank = order_and_ranks(-best)
    leaving, left = order[:, :r], best.shape[1] - r
    targets = gather(partner, leaving)
    if class_token:
        new = here - (leaving[:, None, :] < here[..., None]).sum(-1, dtype=jnp.int32)
        sources = _sources(leaving, left, tokens - apart - r)
    else:
        new = rank - r
        odd = 2 * here[:, : (tokens - apart) // 2] + 1
        sources = jnp.concatenate([2 * order[:, r:], odd], axis=1)
    even, odd = jnp.where(rank < r, left + partner, new), left + here
    places = jnp.stack([even, odd], axis=-1).reshape(metric.shape[0], -1)[:, : tokens - apart]
    if apart:
        sources, places = behind_prefix(sources, apart), behind_prefix(places, apart)
    return Matching(sources, apart + 2 * leaving, targets, places, apart)


def _proposals(metric):
    """Find the best similarity of every token of A to B, and with which token of B it is."""
    batch, tokens, size = metric.shape
    pairs = pad_end(metric, tokens % 2, axis=1).reshape(batch, -1, 2, size)
    # Each set in one piece. A GPU that computes the metric in the same pass takes twice as long.
    pairs = jax.lax.optimization_barrier(jnp.moveaxis(pairs, 2, 0))
    even, odd = unit_vectors(pairs)
    similarity = accurate_einsum("bnd,bmd->bnm", even, odd)[..., : tokens // 2]
    return similarity.max(-1), similarity.argmax(-1).astype(jnp.int32)


def _sources(leaving, left: int, tokens: int):
    """Tell where every token stood that does not leave: the rest of A in ascending order, then B.

    Args:
        leaving: what leaves, counted within A.
        left: tokens of A that stay.
        tokens: all that stay.
    """
    before = (leaving[:, None, :] < leaving[:, :, None]).sum(-1, dtype=jnp.int32)
    here = jax.lax.broadcasted_iota(jnp.int32, (leaving.shape[0], tokens), 1)
    passed = ((leaving - before)[:, None, :] <= here[..., None]).sum(-1, dtype=jnp.int32)
    return jnp.where(here < left, 2 * (here + passed), 2 * (here - left) + 1)


def merge_tokens(
    x: Float[Array, "B N C"], sizes: Float[Array, "B N"], matching: Matching
) -> tuple[Float[Array, "B M C"], Float[Array, "B M"]]:
    """Merge matched tokens: means weighted by size, computed in float32; sizes add up.

    Args:
        x: tokens.
        sizes: input tokens that each of them stands for.
        matching: which of them merge.

    Returns:
        The merged tokens in the dtype of `x`, and their sizes.
    """
    sources, targets = matching.sources, matching.targets
    if not targets.shape[1]:
        return gather(x, sources), gather(sizes, sources)
    means, totals = _means(x, sizes, matching)
    # Tokens that others join take their mean, in one pass over all of them.
    odd, count = (x.shape[1] - matching.apart) // 2, sources.shape[1]
    joins = targets[:, None, :] == jnp.arange(odd - count, odd)[None, :, None]
    joined, which = joins.any(-1), joins.argmax(-1)
    return (
        jnp.where(joined[..., None], gather(means, which), gather(x, sources)),
        jnp.where(joined, gather(totals, which), gather(sizes, sources)),
    )


def average_tokens(x: Float[Array, "B N C"], matching: Matching) -> Float[Array, "B M C"]:
    """Merge matched tokens to plain means, whatever they stand for."""
    return merge_tokens(x, jnp.ones(x.shape[:2], accumulator(x.dtype)), matching)[0]


def drop_tokens(x: Float[Array, "B N C"], matching: Matching) -> Float[Array, "B M C"]:
    """Drop the tokens that leave, instead of merging them into those that they join."""
    return gather(x, matching.sources)


def drop_places(matching: Matching) -> Int[Array, "B N"]:
    """Tell where `drop_tokens` puts every token; -1 for those that it drops."""
    staying, places = matching.sources, matching.places
    here = jnp.arange(places.shape[1], dtype=staying.dtype)
    return jnp.where(gather(staying, places) == here[None], places, -1)


def _means(x, sizes, matching):
    """Average every token that leaves with its target and all that join the same, by size."""
    targets, odd = matching.targets, slice(matching.apart + 1, None, 2)
    leaving, leaving_sizes = gather(x, matching.leaving), gather(sizes, matching.leaving)
    # Those that join the same one find the same mean.
    together = targets[:, :, None] == targets[:, None, :]
    parts, counted = (
        jnp.where(together, each[:, None, :], 0)
        for each in (leaving_sizes, _as_multiplied(leaving_sizes, x))
    )
    weights = gather(sizes[:, odd], targets)
    sums = _sum_by(counted, leaving)
    sums += gather(x[:, odd], targets).astype(sums.dtype) * weights[..., None]
    means = sums / (weights + counted.sum(-1))[..., None]
    return means.astype(x.dtype), weights + parts.sum(-1)


def merge_groups(
    x: Float[Array, "B N C"],
    weights: Float[Array, "B N"],
    places: Int[Array, "B N"],
    *,
    tokens: int,
) -> Float[Array, "B M C"]:
    """Merge groups of any number of tokens: weighted means, computed in float32.

    Args:
        x: tokens.
        weights: how much each counts; rounded to 11 bits where the tokens have 16.
        places: the new token that each becomes a part of; -1 for one that is dropped.
        tokens: how many new tokens there are; each has at least one part.

    Returns:
        The means in the dtype of `x`.
    """
    parts = _parts(_as_multiplied(weights, x), places, tokens)
    return (_sum_by(parts, x) / parts.sum(-1, keepdims=True)).astype(x.dtype)


def _as_multiplied(weights, x):
    """Round weights as `_sum_by` does, so that a sum divided by theirs is a mean."""
    if x.dtype == accumulator(x.dtype):
        return weights
    return jax.lax.reduce_precision(weights, exponent_bits=8, mantissa_bits=10)


def _sum_by(weights, x):
    """Add up tokens by weights, in float32 at least.

    Tokens of 16 bits are multiplied in TF32, which a GPU does eight times as fast: it holds them
    as they are, and 11 bits of weights, such as sizes to 2,048.
    """
    wide = accumulator(x.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == wide else jax.lax.Precision.HIGH
    return jnp.einsum("bmn,bnc->bmc", weights, x.astype(wide), precision=precision)


def sum_groups(
    weights: Float[Array, "B N"], places: Int[Array, "B N"], *, tokens: int
) -> Float[Array, "B M"]:
    """Add up the weights of each group; see `merge_groups`."""
    return _parts(weights, places, tokens).sum(-1)


def _parts(weights, places, tokens: int) -> Float[Array, "B M N"]:
    """Spread weights over a row for each group, in which those of others are 0."""
    here = places[:, None, :] == jnp.arange(tokens, dtype=places.dtype)[None, :, None]
    return jnp.where(here, weights[:, None, :], 0)


def count_by_ratio(ratio: float, tokens: int) -> int:
    """Count the tokens that leave where a part of them stays: in float64, as Python rounds."""
    return math.floor(tokens - tokens * ratio)


def unmerge_tokens(x: Float[Array, "B M C"], matching: Matching) -> Float[Array, "B N C"]:
    """Put merged tokens back: every token of before takes the value of the one that holds it.

    Args:
        x: tokens after merging.
        matching: what merged them.
    """
    return gather(x, matching.places)
