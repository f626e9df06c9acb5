"""Groups of tokens with equal hashes, and their means (Zheng et al. 2020)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import gather, pad_end
from hvit_jax.ops.hashing import HashDraws, hash_words
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accurate_einsum
from hvit_jax.ops.sorting import put_back, sort_words

CHUNK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Tokens grouped by their hash, for every image and head.

    Groups are numbered in hash order, so that each is a run of tokens sorted by hash.

    Attributes:
        members: the group of every token.
        order: token indices sorted by hash.
        slots: the groups of the tokens in that order, ascending.
        starts: where each group's run starts in that order; N for unused groups.
        counts: tokens of each group; 0 for unused ones, which come last.
        distinct: how many hashes differ; above `K`, neighbouring ones share a group.
    """

    members: Int[Array, "B H N"]
    order: Int[Array, "B H N"]
    slots: Int[Array, "B H N"]
    starts: Int[Array, "B H K"]
    counts: Int[Array, "B H K"]
    distinct: Int[Array, "B H"]


def group_tokens(
    x: Float[Array, "B N H D"], draws: HashDraws, *, max_groups: int, scale: float = 1.0
) -> Groups:
    """Group vectors of equal hash, for every image and head on its own.

    Args:
        x: vectors.
        draws: the random numbers of the hash.
        max_groups: K. Where more hashes differ, say G, hash `g` in hash order goes to group
            `g * K // G`, so that neighbours merge evenly.
        scale: as for `hash_bins`.

    Differs from the original: it makes as many groups as it finds hashes.
    """
    ordered, order = sort_words(*hash_words(x, draws, scale=scale))
    pairs = [word[..., 1:] != word[..., :-1] for word in ordered]
    differs = functools.reduce(jnp.logical_or, pairs)
    numbers = jnp.pad(jnp.cumsum(differs, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    distinct = numbers[..., -1:] + 1
    slots = jnp.where(distinct > max_groups, numbers * max_groups // distinct, numbers)
    starts = _starts(slots, max_groups)
    return Groups(
        members=put_back(slots, order),
        order=order,
        slots=slots,
        starts=starts,
        counts=jnp.diff(starts, axis=-1, append=slots.shape[-1]),
        distinct=distinct[..., 0],
    )


def _starts(slots: Int[Array, "B H N"], max_groups: int) -> Int[Array, "B H K"]:
    """Find where each group's run starts."""
    if backend() == "onnx":  # There, what is out of range cannot be dropped.
        names = jnp.arange(max_groups).reshape(1, 1, -1, 1)
        return (slots[:, :, None] < names).sum(-1, dtype=jnp.int32)
    size, places = slots.shape[-1], jnp.arange(slots.shape[-1], dtype=jnp.int32)
    first = jnp.diff(slots, axis=-1, prepend=-1) > 0
    # Beyond the groups, and each its own: there is nothing to write.
    targets = jnp.where(first, slots, max_groups + places[None, None])

    def write(targets):
        starts = jnp.full(max_groups, size, jnp.int32)
        return starts.at[targets].set(places, unique_indices=True, mode="drop")

    return jax.vmap(jax.vmap(write))(targets)


def group_means(x: Float[Array, "B N H D"], groups: Groups) -> Float[Array, "B K H D"]:
    """Average the vectors of each group; zeros for unused groups.

    Args:
        x: vectors, in the tokens' order.
        groups: their groups, which may stem from other vectors of the same tokens.

    Returns:
        Means in the dtype of `x`, summed in float32 at least.
    """
    # One-hot products in chunks of sorted tokens: over all tokens at once they would cost as much
    # as attention, and differences of running sums would cancel digits.
    batch, size, heads, width = x.shape
    length = min(CHUNK, size)
    tail = -size % length
    rows = gather(x, groups.order.swapaxes(1, 2)).swapaxes(1, 2)
    rows = pad_end(rows, tail, axis=2)
    rows = rows.reshape(batch, heads, -1, length, width)
    slots = pad_end(groups.slots, tail, axis=2)  # Whatever their group is, its rows are 0.
    slots = slots.reshape(batch, heads, -1, length)
    local = slots - slots[..., :1]
    hot = (local[..., None] == jnp.arange(length).reshape(1, 1, 1, 1, -1)).astype(x.dtype)
    parts = accurate_einsum("bhctl,bhctd->bhcld", hot, rows)
    sums = _first_parts(parts, local, groups) + _later_parts(parts, slots, groups)
    means = sums / jnp.maximum(groups.counts, 1)[..., None].astype(sums.dtype)
    return means.swapaxes(1, 2).astype(x.dtype)


def _first_parts(parts, local, groups) -> Float[Array, "B H K D"]:
    """Pick each group's sum over the chunk in which its run starts."""
    batch, heads, chunks, length, width = parts.shape
    starts = jnp.minimum(groups.starts, groups.slots.shape[-1] - 1)
    within = gather(local.reshape(batch, heads, -1), starts, axis=2)
    places = starts // length * length + within
    flat = parts.reshape(batch, heads, chunks * length, width)
    first = gather(flat, places, axis=2)
    return jnp.where(groups.counts[..., None] > 0, first, 0)


def _later_parts(parts, slots, groups) -> Float[Array, "B H K D"]:
    """Add up each group's sums over the chunks that its run only continues in, as their first."""
    continues = slots[..., 1:, 0] == slots[..., :-1, -1]
    names = jnp.arange(groups.counts.shape[-1]).reshape(1, 1, -1, 1)
    hot = (slots[..., None, 1:, 0] == names) & continues[..., None, :]
    return accurate_einsum("bhkc,bhcd->bhkd", hot.astype(parts.dtype), parts[..., 1:, 0, :])


def member_codes(
    groups: Groups, *, size: int, dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "B K H {size}"], Float[Array, "B N H {size}"]]:
    """Make queries and keys with which attention averages the values of each group's members.

    A query and a key hold the binary digits of a group's number as 1 and -1. A member's score is
    at least 64 above those of all others, whose weights are 0 beside it in any precision.

    Args:
        groups: the groups. Queries of unused ones average values of no meaning, if finite.
        size: channels of a head, at least as many as K has binary digits.
        dtype: type of the codes; 16 bits hold them.
    """
    limit = groups.counts.shape[-1]
    channels = jnp.arange(size)
    digits = max(1, (limit - 1).bit_length())

    def code(numbers):
        place = channels.reshape(*(1,) * numbers.ndim, size)
        bits = (numbers[..., None] >> jnp.minimum(place, digits)) & 1
        return jnp.where(place < digits, 2 * bits - 1, 0).astype(dtype)

    names = jnp.broadcast_to(
        code(jnp.arange(limit))[:, None], (limit, groups.members.shape[1], size)
    )
    queries = jnp.broadcast_to(names, (groups.members.shape[0], *names.shape))
    keys = 32 * math.sqrt(size) * code(groups.members.swapaxes(1, 2))
    return queries, keys.astype(dtype)


def copy_to_members(x: Float[Array, "B K H D"], groups: Groups) -> Float[Array, "B N H D"]:
    """Give every token the vector of its group."""
    return gather(x, groups.members.swapaxes(1, 2))
