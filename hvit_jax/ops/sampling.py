"""Inverse transform sampling of tokens, as ATS does it (Fayyaz et al. 2022, arXiv 2111.15667)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hvit_jax.ops.arrays import gather, stable_exp
from hvit_jax.ops.precision import accumulator, accurate_einsum
from hvit_jax.ops.sorting import argsort, sort

EPSILON = 1e-6


def masked_weights(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B N H D"],
    valid: Bool[Array, "B N"],
    rows: Int[Array, " B"],
) -> Float[Array, "B H Q N"]:
    """Compute attention weights of the valid keys: exp(a - max), then (+e/N) / (sum + e).

    An image with fewer valid keys than `rows` has padding, whose scores are 0 because its q and k
    are, and the maximum runs over these too.

    Differs from the original: keys that are not valid get weight 0, not e/N; their values are 0.

    Args:
        q: some of the queries.
        k: all keys.
        valid: which keys are tokens of the image; the others may hold anything finite.
        rows: N, the image's keys with its padding counted.

    Returns:
        Weights in float32.
    """
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=accumulator(q.dtype))
    keys = valid[:, None, None, :]
    scores = jnp.where(keys, scores * q.shape[-1] ** -0.5, -jnp.inf)
    peak = scores.max(-1, keepdims=True)
    peak = jnp.where((valid.sum(-1) < rows)[:, None, None, None], jnp.maximum(peak, 0), peak)
    weights = stable_exp(scores, peak)
    total = weights.sum(-1, keepdims=True)
    added = EPSILON / rows.astype(weights.dtype)[:, None, None, None]
    weights = (weights + added) / (total + EPSILON)
    return jnp.where(keys, weights, 0)


def mean_rows(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    queries: Bool[Array, "B N"],
    valid: Bool[Array, "B N"],
    rows: Int[Array, " B"],
) -> Float[Array, "B H N"]:
    """Average `masked_weights` over some queries; the weights of one head exist at a time.

    Args:
        q: all queries.
        k: all keys.
        queries: which queries count, at least one.
        valid: as for `masked_weights`.
        rows: as for `masked_weights`.

    Returns:
        Weights in float32.
    """

    def of_head(head):
        q, k = (each[:, :, None] for each in head)
        weights = masked_weights(q, k, valid, rows)[:, 0]
        shares = queries.astype(weights.dtype)
        shares /= shares.sum(1, keepdims=True)
        return accurate_einsum("bq,bqn->bn", shares, weights)

    heads = jax.lax.map(of_head, (jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)))
    return jnp.moveaxis(heads, 0, 1)


def significance(
    weights: Float[Array, "B H N"], v: Float[Array, "B N H D"], *, prefix: int
) -> Float[Array, "B P"]:
    """Score the patch tokens: the attention to it, summed over heads, times the norm of the value.

    Args:
        weights: attention weights of the CLS query, or what stands for them.
        v: values.
        prefix: tokens before the patches.

    Returns:
        Scores in float32 that sum to 1 for each image.
    """
    squares = jnp.square(v.astype(accumulator(v.dtype))).sum((2, 3))
    scores = (weights.sum(1) * jnp.sqrt(squares))[:, prefix:]
    total = scores.sum(-1, keepdims=True)
    return scores / jnp.where(total > 0, total, 1)


def cumulative_scores(
    scores: Float[Array, "B P"], valid: Bool[Array, "B P"], has_padding: Bool[Array, " B"]
) -> Float[Array, "B P"]:
    """Sum up scores in ascending order and scale the sums to a CDF from 0 to 1.

    The sum that becomes 0 is the lowest score, or the 0 of the padding in front of it. A single
    token, or tokens without any score, get 1.

    Args:
        scores: scores in ascending order.
        valid: which of them count, at least one; the others stand in front.
        has_padding: whether the image has padding that counts.

    Returns:
        The CDF, 0 where it is not valid.
    """
    sums = jnp.cumsum(jnp.where(valid, scores, 0), axis=-1)
    least = jnp.where(valid, sums, jnp.inf).min(-1, keepdims=True)
    least = jnp.where(has_padding[:, None], 0, least)
    span = sums[:, -1:] - least
    scaled = jnp.where(span > 0, (sums - least) / jnp.where(span > 0, span, 1), 1)
    return jnp.where(valid, scaled, 0)


def nearest_entries(cdf: Float[Array, "B P"], *, points: int) -> Int[Array, "B {points}"]:
    """Sample a CDF evenly: for each of some evenly spaced values, the index of the nearest entry.

    The values run from the smallest entry that is not 0 up to 1. Of equally near entries the first
    one is taken. Entries of 0, which are padding or the lowest token of an image without padding,
    are never nearest; rounding could make them so beside a tiny score.

    Args:
        cdf: entries in ascending order, the last of them above 0.
        points: how many values.

    Returns:
        Indices into the CDF; many repeat.
    """
    start = jnp.where(cdf > 0, cdf, jnp.inf).min(-1, keepdims=True)
    steps = jnp.arange(points, dtype=jnp.float32)[None]
    values = start + (steps - start * steps) / max(points - 1, 1)
    # XLA fuses the distances into the search, so that points x P numbers are never stored.
    distances = jnp.abs(values[:, :, None] - cdf[:, None, :])
    return jnp.argmin(jnp.where(cdf[:, None, :] > 0, distances, jnp.inf), axis=-1)


def pack_distinct(
    indices: Int[Array, "B S"], *, limit: int
) -> tuple[Int[Array, "B {limit}"], Int[Array, " B"]]:
    """List the distinct indices in ascending order, at most the `limit` largest of them.

    Args:
        indices: indices in any order, with repetitions.
        limit: length of the list; at most S.

    Returns:
        The list, whose entries beyond the image's count mean nothing, and how many distinct indices
        there were, which may be more than `limit`.
    """
    ordered = sort(indices)
    first = jnp.ones_like(ordered[:, :1], dtype=bool)
    new = jnp.concatenate([first, ordered[:, 1:] != ordered[:, :-1]], axis=-1)
    count = new.sum(-1, dtype=jnp.int32)
    beyond = jnp.iinfo(ordered.dtype).max - 1  # The largest is not sorted.
    distinct = sort(jnp.where(new, ordered, beyond))
    start = jnp.maximum(count - limit, 0)
    places = jnp.minimum(start[:, None] + jnp.arange(limit)[None], indices.shape[-1] - 1)
    taken = gather(distinct, places)
    return jnp.where(taken == beyond, 0, taken), count


def sample_tokens(
    scores: Float[Array, "B P"],
    valid: Bool[Array, "B P"],
    has_padding: Bool[Array, " B"],
    *,
    points: int,
    limit: int,
) -> tuple[Int[Array, "B {limit}"], Int[Array, " B"]]:
    """Choose patch tokens by inverse transform sampling of their scores.

    Tokens in ascending order of score divide the interval from 0 to 1 by their scores. Evenly
    spaced points fall on few tokens where few hold most of the score, and on many otherwise.

    Args:
        scores: scores of the patch tokens.
        valid: which of them are tokens of the image; at least one.
        has_padding: whether the image has padding that counts, so that its lowest-scoring token may
            be chosen; without padding it never is, unless it is the only one.
        points: how many points.
        limit: how many tokens may be chosen; the highest-scoring of them are.

    Returns:
        Indices of the chosen patches in ascending order of score, whose entries beyond the image's
        count mean nothing, and how many there were to choose, which may be more than `limit`.
    """
    order = argsort(jnp.where(valid, scores, -1))
    ascending = gather(scores, order)
    cdf = cumulative_scores(ascending, gather(valid, order), has_padding)
    chosen, count = pack_distinct(nearest_entries(cdf, points=points), limit=limit)
    return gather(order, chosen), count


def new_places(
    kept: Int[Array, "B M"], exists: Bool[Array, "B M"], *, tokens: int
) -> Int[Array, "B {tokens}"]:
    """Invert a choice of tokens.

    Args:
        kept: old indices of the tokens that stay, in their new order.
        exists: which entries of `kept` mean anything.
        tokens: how many tokens there were.

    Returns:
        The new index of every old token, -1 for one that does not stay.
    """
    same = (kept[:, None, :] == jnp.arange(tokens)[None, :, None]) & exists[:, None, :]
    return jnp.where(same.any(-1), same.argmax(-1), -1).astype(jnp.int32)
