"""Token merging by bipartite soft matching (Bolya et al. 2023, ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import gather, layer_norm, pad_end
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator, accurate_einsum, rounded
from hvit_jax.ops.selection import behind_prefix
from hvit_jax.ops.sorting import inverse, order_and_ranks, ordered_integers

# The highest place that 16 bits hold.
_PLACES = 2**16 - 1
# Each of our kernel's 128 threads takes the same number of pairs of channels.
KERNEL_CHANNELS = 256


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
        joined: for each token of the new sequence one of the leaving tokens that join it, the
            last of them as they are listed; -1 if none does.
        places: the new position of every token.
        apart: how many stand apart; even.
    """

    sources: Int[Array, "B M"]
    leaving: Int[Array, "B R"]
    targets: Int[Array, "B R"]
    joined: Int[Array, "B M"]
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


def match_tokens(
    metric: Float[Array, "B N D"],
    *,
    r: int,
    prefix: int = 1,
    dtype: jax.typing.DTypeLike | None = None,
) -> Matching:
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
        dtype: the type of the tokens that were measured, if it is not the metric's. For 16 bits a
            GPU multiplies unit vectors as sums of two numbers of bfloat16, exact to 2^-16.

    Returns:
        The matching; merging, sizes, tracing and unmerging all read it.
    """
    tokens = metric.shape[1]
    r = min(r, most_merges(tokens, prefix=prefix))
    # Of the prefix an even number stands apart, so that one at most is in A, and none in B.
    class_token = prefix % 2
    apart = prefix - class_token
    similarity = _similarities(metric[:, apart:], jnp.dtype(dtype or metric.dtype))
    # What a GPU sorts holds similarities of 32 bits, and places of 16.
    fits = similarity.dtype.itemsize == 4 and similarity.shape[1] <= _PLACES + 1
    order = (_order_on_gpu if backend() == "gpu" and fits else _order)(similarity, class_token, r)
    leaving, left = order.places[:, :r], order.places.shape[1] - r
    here = jax.lax.broadcasted_iota(jnp.int32, order.places.shape, 1)
    sources, joined = _sources(leaving, order.targets, left, tokens - apart - r)
    if class_token:
        new = here - (leaving[:, None, :] < here[..., None]).sum(-1, dtype=jnp.int32)
    else:
        new = order.ranks - r
        sources = jnp.concatenate([2 * order.places[:, r:], sources[:, left:]], axis=1)
    even, odd = jnp.where(order.ranks < r, left + order.partners, new), left + here
    places = jnp.stack([even, odd], axis=-1).reshape(metric.shape[0], -1)[:, : tokens - apart]
    if apart:
        sources, places = behind_prefix(sources, apart), behind_prefix(places, apart)
        joined = jnp.pad(joined, ((0, 0), (apart, 0)), constant_values=-1)
    return Matching(sources, apart + 2 * leaving, order.targets, joined, places, apart)


def _similarities(metric, dtype) -> Float[Array, "B A b"]:
    """Multiply the unit vectors of A and B; dtype is that of the tokens."""
    batch, tokens, size = metric.shape
    split = backend() == "gpu" and dtype != accumulator(dtype)
    # Rows of whole pieces of 16 bytes are what tensor cores are fast for.
    spare = -tokens % (16 if split else 2)
    pairs = pad_end(metric, spare, axis=1).reshape(batch, -1, 2, size)
    # Each set in one piece. A GPU that computes the metric in the same pass takes twice as long.
    pairs = jax.lax.optimization_barrier(jnp.moveaxis(pairs, 2, 0))
    unit = unit_vectors(pairs)
    similarity = accurate_einsum("bnd,bmd->bnm", *(_in_two_parts(unit) if split else unit))
    return similarity[:, : -(-tokens // 2), : tokens // 2]


def _in_two_parts(unit):
    """Write both sets as sums of numbers of bfloat16, whose products one product adds up.

    A is high, low, high and B is high, high, low. Products of two low parts, below 2^-16, are left
    out.
    """
    *rows, size = unit.shape
    high = rounded(unit, jnp.bfloat16)
    # Chosen, not joined: XLA joins in the same pass only what is a power of two wide.
    which, part = (jax.lax.broadcasted_iota(jnp.int32, (*rows, 3, 1), axis) for axis in (0, 3))
    parts = jnp.where(part == 1 + which, (unit - high)[..., None, :], high[..., None, :])
    return parts.astype(jnp.bfloat16).reshape(*rows, 3 * size)


class _Order(NamedTuple):
    """Proposals of the tokens of A, the best first.

    Attributes:
        places: whose each is.
        targets: the token of B that each of the first `r` is made to.
        partners: the token of B that every token of A proposes to, in A's order.
        ranks: the number of every token's proposal, in A's order.
    """

    places: Int[Array, "B A"]
    targets: Int[Array, "B R"]
    partners: Int[Array, "B A"]
    ranks: Int[Array, "B A"]


def _order(similarity, class_token: int, r: int) -> _Order:
    best, partners = similarity.max(-1), similarity.argmax(-1).astype(jnp.int32)
    if class_token:
        here = jax.lax.broadcasted_iota(jnp.int32, best.shape, 1)
        best = jnp.where(here == 0, -jnp.inf, best)
    places, ranks = order_and_ranks(-best)
    return _Order(places, gather(partners, places[:, :r]), partners, ranks)


def _order_on_gpu(similarity, class_token: int, r: int) -> _Order:
    """Find and sort the best proposals in two kernels: a similarity carries its places.

    A number of 64 bits holds a similarity of 32 and, lower, the places in A and B, 16 bits each.
    """
    with jax.enable_x64(True):
        here, there = (jax.lax.broadcasted_iota(jnp.int64, similarity.shape, i) for i in (1, 2))
        below = jnp.where(here == 0, jnp.inf, -similarity) if class_token else -similarity
        keys = ordered_integers(below).astype(jnp.int64) << 32 | here << 16 | there
        best = keys.min(-1)
        ordered = jax.lax.sort(best, is_stable=False)
        places, targets = ordered >> 16 & _PLACES, ordered[:, :r] & _PLACES
        found = places, targets, best & _PLACES
        places, targets, partners = (numbers.astype(jnp.int32) for numbers in found)
    return _Order(places, targets, partners, inverse(places))


def _sources(leaving, targets, left: int, tokens: int):
    """Tell where every token stood that does not leave, and which token joins it.

    Args:
        leaving: what leaves, counted within A.
        targets: what it joins, counted within B.
        left: tokens of A that stay.
        tokens: all that stay.

    Returns:
        For the rest of A in ascending order, then for B: where each stood; and the number of a
        leaving token that joins it, or -1.
    """
    here = jax.lax.broadcasted_iota(jnp.int32, (leaving.shape[0], tokens), 1)
    if not leaving.shape[1]:
        return jnp.where(here < left, 2 * here, 2 * (here - left) + 1), jnp.full_like(here, -1)
    before = (leaving[:, None, :] < leaving[:, :, None]).sum(-1, dtype=jnp.int32)
    # What is left to do behind a sum or maximum is a kernel of its own on a GPU.
    row, number = here[..., None], jnp.arange(leaving.shape[1], dtype=jnp.int32)
    # As many leave before one of A that stays as leave before the last of these, and this one.
    passed = jnp.where((leaving - before)[:, None, :] <= row, before[:, None, :] + 1, 0)
    sources = jnp.where(row < left, 2 * (row + passed), 2 * (row - left) + 1).max(-1)
    return sources, jnp.where(targets[:, None, :] == row - left, number, -1).max(-1)


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
    sources = matching.sources
    if not matching.targets.shape[1]:
        return gather(x, sources), gather(sizes, sources)
    means, totals = _means(x, sizes, matching)
    # Tokens that others join take their mean, in one pass over all of them.
    joined, which = matching.joined >= 0, jnp.maximum(matching.joined, 0)
    return (
        jnp.where(joined[..., None], gather(means, which), gather(x, sources)),
        jnp.where(joined, gather(totals, which), gather(sizes, sources)),
    )


def merge_and_normalise(
    x: Float[Array, "B N C"],
    sizes: Float[Array, "B N"],
    matching: Matching,
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    *,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "B M C"], Float[Array, "B M"], Float[Array, "B M C"]]:
    """Merge matched tokens, and normalise them, in our kernel for Hopper GPUs.

    Args:
        x: tokens of 16 bits; channels are a multiple of `KERNEL_CHANNELS`.
        sizes: input tokens that each of them stands for.
        matching: which of them merge; some do.
        scale: of the LayerNorm; rounded to the dtype of `x`.
        bias: of the LayerNorm; rounded so too.
        epsilon: what the LayerNorm adds to the variance.
        dtype: of normalised tokens.

    Returns:
        What `merge_tokens` gives, and the normalised tokens.
    """
    # Taken apart: JAX makes a matching of other objects where it matches trees.
    numbers, tree = jax.tree.flatten(matching)
    return _by_kernel(tree, epsilon, dtype, numbers, x, sizes, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_kernel(tree, epsilon, dtype, numbers, x, sizes, scale, bias):
    # Imported where it is needed: Pallas takes a quarter of a second.
    from hvit_jax.ops import hopper_merging

    matching = tree.unflatten(numbers)
    targets, here = matching.targets, jnp.arange(matching.targets.shape[1], dtype=jnp.int32)
    other, together = here[:, None], targets[:, :, None] == targets[:, None, :]
    following = jnp.where(together & (here < other), here, -1).max(-1)
    # As a maximum too it is found in the same kernel.
    leaving = jnp.where(here == other, matching.leaving[:, None, :], 0).max(-1)
    joins = matching.sources, matching.joined, leaving, following
    return hopper_merging.merge_and_normalise(
        x, sizes, *joins, scale, bias, epsilon=epsilon, dtype=dtype
    )


def _in_turn(tree, epsilon, dtype, numbers, *inputs):
    def run(x, sizes, scale, bias):
        merged, sizes = merge_tokens(x, sizes, tree.unflatten(numbers))
        scale, bias = scale.astype(x.dtype), bias.astype(x.dtype)
        return merged, sizes, layer_norm(merged, scale, bias, epsilon=epsilon).astype(dtype)

    return jax.vjp(run, *inputs)


_by_kernel.defvjp(_in_turn, lambda tree, epsilon, dtype, pull, slopes: (None, *pull(slopes)))


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
