"""Token merging (Bolya et al. 2023, ToMe, arXiv 2210.09461): what becomes of tokens that match."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import gather, layer_norm
from hvit_jax.ops.matching import Matching
from hvit_jax.ops.precision import accumulator

# Each of our kernel's 128 threads takes the same number of pairs of channels.
KERNEL_CHANNELS = 256


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
