"""Who merges with whom: bipartite soft matching (Bolya et al. 2023, ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import gather, pad_end
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator, accurate_einsum, rounded
from hvit_jax.ops.selection import behind_prefix
from hvit_jax.ops.sorting import inverse, order_and_ranks, ordered_integers

# The highest place that 16 bits hold.
_PLACES = 2**16 - 1


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
