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


def behind_prefix(patches: Int[Array, "B M"], prefix: int) -> Int[Array, "B N"]:
    """Turn numbers of patches into numbers of tokens: those of the prefix come first.

    Args:
        patches: counted from 0 behind the prefix.
        prefix: tokens before the patches.

    Returns:
        Numbers from 0 to prefix - 1, then the patches'.
    """
    if prefix == 1:
        return jnp.pad(patches + 1, ((0, 0), (1, 0)))
    first = jnp.broadcast_to(jnp.arange(prefix, dtype=patches.dtype), (patches.shape[0], prefix))
    return jnp.concatenate([first, patches + prefix], axis=1)


def take_tokens(
    x: Float[Array, "B N C"], order: Int[Array, "B M"], *, prefix: int
) -> Float[Array, "B _ C"]:
    """Gather the prefix and the given patches.

    Args:
        x: tokens, the prefix first.
        order: patches, counted from 0 behind the prefix.
        prefix: tokens before the patches.
    """
    return gather(x, behind_prefix(order, prefix))


def put_tokens(
    x: Float[Array, "B N C"],
    order: Int[Array, "B M"],
    tokens: Float[Array, "B _ C"],
    *,
    prefix: int,
) -> Float[Array, "B N C"]:
    """Put tokens back where `take_tokens` found them; the others stay as they are.

    Args:
        x: all tokens, the prefix first.
        order: patches, counted from 0 behind the prefix, each at most once.
        tokens: new values of the prefix and these patches.
        prefix: tokens before the patches.
    """

    def put(x, tokens, index):
        return x.at[index].set(tokens, unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(put)(x, tokens, behind_prefix(order, prefix))


def new_places(order: Int[Array, "B P"], *, prefix: int) -> Int[Array, "B N"]:
    """Tell where `take_tokens` puts every token, the prefix included: the order's inverse."""
    return behind_prefix(inverse(order), prefix)


def keep_best(
    x: Float[Array, "B N C"],
    scores: Float[Array, "B P"],
    order: Int[Array, "B P"],
    *,
    prefix: int,
    keep: int,
    fuse: bool = False,
) -> Float[Array, "B M C"]:
    """Keep the prefix and the patch tokens of highest score; drop the others, or fuse them.

    Args:
        x: tokens, the prefix first.
        scores: of the patch tokens.
        order: the patches by falling score, see `descending_order`.
        prefix: tokens before the patches.
        keep: how many patch tokens to keep.
        fuse: append one token, the sum of score * token over those that are not kept.

    Returns:
        The prefix, the kept tokens by falling score and, if asked for, the fused one.
    """
    if not fuse:
        return take_tokens(x, order[:, :keep], prefix=prefix)
    ordered = take_tokens(x, order, prefix=prefix)
    weights = gather(scores, order[:, keep:])
    dropped = ordered[:, prefix + keep :].astype(accumulator(x.dtype))
    fused = (weights[..., None] * dropped).sum(1, keepdims=True)
    return jnp.concatenate([ordered[:, : prefix + keep], fused.astype(x.dtype)], axis=1)


def fuse_dropped(
    sizes: Float[Array, "B P"], order: Int[Array, "B P"], *, keep: int
) -> Float[Array, "B M"]:
    """Add up the sizes of the patch tokens that `keep_best` fuses; see there."""
    ordered = gather(sizes, order)
    return jnp.concatenate([ordered[:, :keep], ordered[:, keep:].sum(1, keepdims=True)], axis=1)


def best_places(
    order: Int[Array, "B P"], *, prefix: int, keep: int, fuse: bool = False
) -> Int[Array, "B N"]:
    """Tell where `keep_best` puts every token.

    Args:
        order: as for `keep_best`.
        prefix: as for `keep_best`.
        keep: as for `keep_best`.
        fuse: as for `keep_best`.

    Returns:
        For every token, the prefix included, its new index: that of the fused token for those that
        went into it, -1 for those that are gone.
    """
    places, left = new_places(order, prefix=prefix), prefix + keep
    return jnp.where(places >= left, left if fuse else -1, places)


def running_score(
    old: Float[Array, "B P"], new: Float[Array, "B P"], *, tradeoff: float | int
) -> Float[Array, "B P"]:
    """Mix a block's scores into those so far: (1 - tradeoff) * old + tradeoff * new."""
    return (1 - tradeoff) * old + tradeoff * new
