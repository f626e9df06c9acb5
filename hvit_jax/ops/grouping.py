"""Groups of tokens with equal hashes, and attention to group means (Zheng et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.hashing import HashDraws, hash_bins, pack_bins


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Groups:
    """Tokens grouped by their hash, for every image and head.

    Groups are numbered in hash order, so that each is a run of tokens sorted by hash.

    Attributes:
        members: the group of every token.
        order: token indices sorted by hash.
        ends: where each group's run ends in `order` (its last entry); N - 1 for unused groups.
        counts: tokens of each group; 0 for unused ones, which come last.
        distinct: how many hashes differ; above `K`, neighbouring ones share a group.
    """

    members: Int[Array, "B H N"]
    order: Int[Array, "B H N"]
    ends: Int[Array, "B H K"]
    counts: Int[Array, "B H K"]
    distinct: Int[Array, "B H"]


def group_tokens(x: Float[Array, "B N H D"], draws: HashDraws, *, max_groups: int) -> Groups:
    """Group vectors of equal hash, for every image and head on its own.

    Args:
        x: vectors.
        draws: the random numbers of the hash.
        max_groups: K. Where more hashes differ, say G, hash `g` in hash order goes to group
            `g * K // G`, so that neighbours merge evenly.

    Differs from the original: it makes as many groups as it finds hashes.
    """
    high, low = pack_bins(hash_bins(x, draws))
    positions = jax.lax.broadcasted_iota(jnp.int32, high.shape, 2)
    high, low, order = jax.lax.sort((high, low, positions), num_keys=2)
    differs = (high[..., 1:] != high[..., :-1]) | (low[..., 1:] != low[..., :-1])
    ranks = jnp.pad(jnp.cumsum(differs, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    distinct = ranks[..., -1:] + 1
    slots = jnp.where(distinct > max_groups, ranks * max_groups // distinct, ranks)
    return Groups(
        members=jax.lax.sort((order, slots), num_keys=1)[1],
        order=order,
        distinct=distinct[..., 0],
        **_runs(slots, max_groups),
    )


def _runs(slots: Int[Array, "B H N"], max_groups: int) -> dict[str, Int[Array, "B H K"]]:
    """Find where each group's run ends, by sorting the ends to the front."""
    size = slots.shape[-1]
    last = jnp.pad(slots[..., 1:] != slots[..., :-1], ((0, 0), (0, 0), (0, 1)))
    ends = jnp.sort(jnp.where(last, jnp.arange(size, dtype=jnp.int32), size - 1))
    missing = max(0, max_groups - size)
    ends = jnp.pad(ends[..., :max_groups], ((0, 0), (0, 0), (0, missing)), mode="edge")
    return {"ends": ends, "counts": jnp.diff(ends, axis=-1, prepend=-1)}


def group_means(x: Float[Array, "B N H D"], groups: Groups) -> Float[Array, "B K H D"]:
    """Average the vectors of each group; unused groups hold the mean of all.

    Args:
        x: vectors, in the tokens' order.
        groups: their groups, which may stem from other vectors of the same tokens.

    Returns:
        Means in the dtype of `x`.
    """
    # A group is a run of sorted tokens, so its sum is a difference of two running sums: linear in N
    # where a one-hot product costs as much as attention itself and holds K x N weights per head.
    # Running sums of centred values stay small, so that the difference loses no digits to them.
    exact = x.astype(jnp.float32)
    centre = exact.mean(axis=1, keepdims=True)
    running = jnp.cumsum(_take(exact - centre, groups.order), axis=1)
    sums = jnp.diff(_take(running, groups.ends), axis=1, prepend=0)
    counts = jnp.maximum(groups.counts, 1).swapaxes(1, 2)[..., None]
    return (sums / counts + centre).astype(x.dtype)


def copy_to_members(x: Float[Array, "B K H D"], groups: Groups) -> Float[Array, "B N H D"]:
    """Give every token the vector of its group."""
    return _take(x, groups.members)


def _take(x: Float[Array, "B N H D"], indices: Int[Array, "B H K"]) -> Float[Array, "B K H D"]:
    places = indices.swapaxes(1, 2)[..., None]
    return jnp.take_along_axis(x, places, axis=1, mode="promise_in_bounds")


def counted_attention(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B K H D"],
    v: Float[Array, "B K H D"],
    counts: Int[Array, "B H K"],
) -> Float[Array, "B N H D"]:
    """Attend to means of keys as if each were there as often as its group has members.

    A weight times its count, renormalised, is a softmax with the logarithm of the count added.

    Args:
        q: queries.
        k: mean keys.
        v: mean values.
        counts: members of each group; a group without any is ignored.
    """
    scores = jnp.einsum("bnhd,bkhd->bhnk", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5 + jnp.log(counts.astype(jnp.float32))[:, :, None, :]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhnk,bkhd->bnhd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
