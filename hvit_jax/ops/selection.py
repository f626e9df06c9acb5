"""Selecting tokens by score: EViT's top-k with fusing, Evo-ViT's reordering and running score."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import gather
from hvit_jax.ops.precision import accumulator
from hvit_jax.ops.sorting import argsort, inverse


def kept_tokens(keep_rate: float | int, patches: int) -> int:
    """Count the patch tokens that a keep rate leaves: rounded up, in float64 as Python has it."""
    return math.ceil(keep_rate * patches)


def descending_order(scores: Float[Array, "B P"]) -> Int[Array, "B P"]:
    """Sort patches by falling score; of equal scores the lower index comes first."""
    return argsort(-scores)


def behind_cls(patches: Int[Array, "B K"]) -> Int[Array, "B K+1"]:
    """Turn numbers of patches into numbers of tokens: CLS, token 0, comes first."""
    return jnp.pad(patches + 1, ((0, 0), (1, 0)))


def take_tokens(x: Float[Array, "B N C"], order: Int[Array, "B K"]) -> Float[Array, "B K+1 C"]:
    """Gather CLS and the given patches.

    Args:
        x: tokens, CLS first.
        order: patches, counted from 0 behind CLS.
    """
    return gather(x, behind_cls(order))


def put_tokens(
    x: Float[Array, "B N C"], order: Int[Array, "B K"], tokens: Float[Array, "B K+1 C"]
) -> Float[Array, "B N C"]:
    """Put tokens back where `take_tokens` found them; the others stay as they are.

    Args:
        x: all tokens, CLS first.
        order: patches, counted from 0 behind CLS, each at most once.
        tokens: new values of CLS and these patches.
    """

    def put(x, tokens, index):
        return x.at[index].set(tokens, unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(put)(x, tokens, behind_cls(order))


def new_places(order: Int[Array, "B P"]) -> Int[Array, "B P+1"]:
    """Tell where `take_tokens` puts every token, CLS included: the order's inverse."""
    return behind_cls(inverse(order))


def keep_best(
    x: Float[Array, "B N C"],
    scores: Float[Array, "B P"],
    order: Int[Array, "B P"],
    *,
    keep: int,
    fuse: bool = False,
) -> Float[Array, "B M C"]:
    """Keep CLS and the patch tokens of highest score; drop the others, or fuse them into one.

    Args:
        x: tokens, CLS first.
        scores: of the patch tokens.
        order: the patches by falling score, see `descending_order`.
        keep: how many patch tokens to keep.
        fuse: append one token, the sum of score * token over those that are not kept.

    Returns:
        CLS, the kept tokens by falling score and, if asked for, the fused one.
    """
    if not fuse:
        return take_tokens(x, order[:, :keep])
    ordered = take_tokens(x, order)
    weights = gather(scores, order[:, keep:])
    dropped = ordered[:, keep + 1 :].astype(accumulator(x.dtype))
    fused = (weights[..., None] * dropped).sum(1, keepdims=True)
    return jnp.concatenate([ordered[:, : keep + 1], fused.astype(x.dtype)], axis=1)


def best_places(order: Int[Array, "B P"], *, keep: int, fuse: bool = False) -> Int[Array, "B P+1"]:
    """Tell where `keep_best` puts every token.

    Args:
        order: as for `keep_best`.
        keep: as for `keep_best`.
        fuse: as for `keep_best`.

    Returns:
        For every token, CLS included, its new index: that of the fused token for those that went
        into it, -1 for those that are gone.
    """
    places = new_places(order)
    return jnp.where(places > keep, keep + 1 if fuse else -1, places)


def running_score(
    old: Float[Array, "B P"], new: Float[Array, "B P"], *, tradeoff: float | int
) -> Float[Array, "B P"]:
    """Mix a block's scores into those so far: (1 - tradeoff) * old + tradeoff * new."""
    return (1 - tradeoff) * old + tradeoff * new
