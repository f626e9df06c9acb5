"""Token merging by bipartite soft matching (Bolya et al. 2023, ToMe, arXiv 2210.09461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

from hvit_jax.errors import InputError
from hvit_jax.ops.clustering import accurate_einsum


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matching:
    """Which tokens merge, and where every token goes.

    Set A holds the tokens at even positions, set B those at odd ones. The new sequence is the kept
    tokens of A, then all of B.

    Attributes:
        kept: positions of the tokens of A that stay, in their new order.
        merged: positions of the tokens of A that merge, most similar first.
        targets: the token that each of these joins, counted within B.
        places: the new position of every token.
    """

    kept: Int[Array, "B U"]
    merged: Int[Array, "B R"]
    targets: Int[Array, "B R"]
    places: Int[Array, "B N"]


def merge_counts(r: int | Sequence[int | float], blocks: int) -> tuple[int, ...]:
    """Spell out how many tokens each block is asked to merge.

    Args:
        r: a number for all blocks; one a block, with 0 for those left out at the end; or
            (r, inflection), two entries of which the second is a float: a linear schedule of mean
            `r` that rises for an inflection above 0 (1.0: from 0 to 2r) and falls below 0.
        blocks: blocks of the model.

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
            raise InputError(f"tome: r={r!r}: the inflection must be between -1 and 1")
        first = int(mean * (1 - inflection))
        step = (2 * mean - 2 * first) / max(1, blocks - 1)
        counts = tuple(first + step * block for block in range(blocks))
    if len(counts) > blocks:
        raise InputError(f"tome: r lists {len(counts)} numbers, the model has {blocks} blocks")
    if min(counts, default=0) < 0:
        raise InputError(f"tome: r={r!r}: merged tokens a block must be at least 0")
    return tuple(map(int, counts)) + (0,) * (blocks - len(counts))


def most_merges(tokens: int, *, class_token: bool = True) -> int:
    """Count the tokens that one block can merge: half of those that are not the class token."""
    return (tokens - class_token) // 2


def match_tokens(metric: Float[Array, "B N D"], *, r: int, class_token: bool = True) -> Matching:
    """Choose `r` pairs of similar tokens, each of one token of A and one of B.

    Every token of A proposes to the token of B of highest cosine similarity, and the `r` best
    proposals win. Several tokens may join the same one. Of equal similarities the lower position
    wins. No gradient flows into the choice.

    Args:
        metric: what similarity is measured on, of at least two tokens; taken in float32 whatever
            its dtype, since rounded similarities of tokens that are alike would often tie.
        r: tokens to merge, capped to `most_merges`.
        class_token: whether the first token is a class token, which never merges. With one, kept
            tokens stay in ascending order; without, they come in descending similarity.

    Returns:
        The matching; merging, sizes, tracing and unmerging all read it.
    """
    tokens = metric.shape[1]
    r = min(r, most_merges(tokens, class_token=class_token))
    metric = jax.lax.stop_gradient(metric.astype(jnp.float32))
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    similarity = accurate_einsum("bnd,bmd->bnm", metric[:, ::2], metric[:, 1::2])
    best, partner = similarity.max(-1), similarity.argmax(-1).astype(jnp.int32)
    here = jnp.arange(best.shape[1], dtype=jnp.int32)
    if class_token:
        best = jnp.where(here == 0, -jnp.inf, best)
    rank, stay = ranks(-best), len(here) - r
    # A in its new order: those that stay, then those that merge.
    order = ranks(jnp.where(rank < r, len(here) + rank, here if class_token else rank))
    sequence = invert(order)
    places = jnp.stack(
        [jnp.where(rank < r, stay + partner, order), jnp.broadcast_to(stay + here, rank.shape)],
        axis=-1,
    )
    return Matching(
        kept=2 * sequence[:, :stay],
        merged=2 * sequence[:, stay:],
        targets=_take(partner, sequence[:, stay:]),
        places=places.reshape(len(metric), -1)[:, :tokens],
    )


def ranks(values: Real[Array, "B M"]) -> Int[Array, "B M"]:
    """Tell every value's place in ascending order; of equal values the first comes first.

    Counting the lower values is one small fused kernel on a GPU, where a sort of a few hundred
    values takes many and compiles slowly.
    """
    here = jnp.arange(values.shape[1])
    mine, other = values[:, :, None], values[:, None, :]
    before = (other < mine) | ((other == mine) & (here < here[:, None]))
    return before.sum(-1, dtype=jnp.int32)


def invert(order: Int[Array, "B M"]) -> Int[Array, "B M"]:
    """Invert permutations: where entry `i` holds `j`, entry `j` of the result holds `i`."""
    here = jnp.arange(order.shape[1], dtype=jnp.int32)
    return jnp.where(order[:, None, :] == here[:, None], here, 0).sum(-1, dtype=jnp.int32)


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
    here = jnp.arange(x.shape[1] // 2)
    joins = matching.targets[:, None, :] == here[:, None]
    parts = jnp.where(joins, _take(sizes, matching.merged)[:, None, :], 0)
    own = sizes[:, 1::2]
    total = own + parts.sum(-1)
    moved = accurate_einsum(
        "bmr,brc->bmc", parts / total[..., None], _take(x, matching.merged).astype(jnp.float32)
    )
    means = x[:, 1::2].astype(jnp.float32) * (own / total)[..., None] + moved
    tokens = jnp.concatenate([_take(x, matching.kept), means.astype(x.dtype)], axis=1)
    return tokens, jnp.concatenate([_take(sizes, matching.kept), total], axis=1)


def unmerge_tokens(x: Float[Array, "B M C"], matching: Matching) -> Float[Array, "B N C"]:
    """Put merged tokens back: every token of before takes the value of the one that holds it.

    Args:
        x: tokens after merging.
        matching: what merged them.
    """
    return _take(x, matching.places)


def _take(values: Array, positions: Int[Array, "B K"]) -> Array:
    positions = positions.reshape(positions.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, positions, axis=1, mode="promise_in_bounds")
