"""Random hashes of vectors: E2LSH (for ACT), and XBOX+ projections (for SMYRF)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Integer

from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator, accurate_einsum

BIN_WIDTH = 8


class HashDraws(NamedTuple):
    """Random numbers of E2LSH (Datar et al. 2004).

    Attributes:
        projection: one direction a hash, standard normal.
        offset: one shift a hash, uniform between 0 and 1.
    """

    projection: Float[Array, "D hashes"]
    offset: Float[Array, " hashes"]


class ProjectionDraws(NamedTuple):
    """Random numbers of SMYRF's hash, one column a round.

    Attributes:
        alpha: directions, standard normal, for vectors with two more channels.
        beta: shifts, uniform between 0 and 1.
    """

    alpha: Float[Array, "D+2 rounds"]
    beta: Float[Array, " rounds"]


def draw_hashes(key: jax.Array, size: int, hashes: int) -> HashDraws:
    """Draw the random numbers of E2LSH for vectors of one size.

    Args:
        key: a jax.random key.
        size: channels of a vector, D.
        hashes: number of hashes.
    """
    projection, offset = jax.random.split(key)
    return HashDraws(
        jax.random.normal(projection, (size, hashes), jnp.float32),
        jax.random.uniform(offset, (hashes,), jnp.float32),
    )


def hash_bins(
    x: Float[Array, "B N H D"], draws: HashDraws, *, scale: float = 1.0
) -> Int32[Array, "B H N hashes"]:
    """Hash vectors to bins, `floor((scale * x @ projection + offset) / 8)`, from the lowest.

    Args:
        x: vectors. Products are summed in float32 at least; vectors of 16 bits meet directions that
            are rounded alike.
        draws: the random numbers, shared by all images and heads.
        scale: what the vectors are multiplied with.

    Returns:
        Bins minus their minimum over the N vectors of the same image and head.
    """
    bins = _bins("bhne", x, draws, scale)
    return bins - bins.min(axis=2, keepdims=True)


def _bins(axes: str, x, draws, scale) -> Array:
    projection = draws.projection
    if x.dtype == accumulator(x.dtype):
        x = scale * x
    else:
        projection = (scale * projection).astype(x.dtype)
    projected = accurate_einsum(f"bnhd,de->{axes}", x, projection)
    offset = draws.offset.reshape([-1 if axis == "e" else 1 for axis in axes])
    return jnp.floor((projected + offset) / BIN_WIDTH).astype(jnp.int32)


def hash_words(
    x: Float[Array, "B N H D"], draws: HashDraws, *, scale: float = 1.0
) -> tuple[Integer[Array, "B H N"], ...]:
    """Hash vectors to words that are equal and ordered as those of their bins, packed.

    A GPU subtracts the lowest bins from the sums, not from every bin: that is the same, and saves a
    pass over all bins. Sums of up to 16 hashes do not wrap, whatever the bins are: nothing needs to
    be subtracted from them, since it would not change their order.

    Args:
        x: as for `hash_bins`.
        draws: as for `hash_bins`.
        scale: as for `hash_bins`.

    Returns:
        Words as of `pack_bins`.
    """
    if backend() != "gpu":
        return pack_bins(hash_bins(x, draws, scale=scale))
    bins = _bins("ebnh", x, draws, scale)
    # As lists, or else XLA would turn the bins, of which there are many more than of words.
    high, low = (word.reshape(bins.shape[1:]) for word in _pack(bins.reshape(len(bins), -1)))
    if len(bins) > 16:
        # Packed once: XLA would do so again for the borrow, and for each word.
        high, low = jax.lax.optimization_barrier((high, low))
        least_high, least_low = _pack(bins.min(axis=2, keepdims=True))
        high = high - least_high - (low < least_low).astype(jnp.int32)
        low = low - least_low
    return high.swapaxes(1, 2), low.swapaxes(1, 2)


def pack_bins(bins: Int32[Array, "B H N hashes"]) -> tuple[Integer[Array, "B H N"], ...]:
    """Pack the bins of a vector to one 64-bit number, the sum of `bin << 2 * hash`.

    The sum wraps as two's complement does. It comes in words, since JAX has no 64-bit integers by
    default: comparing them one after the other orders the signed numbers.

    Args:
        bins: bins of at most 32 hashes; in ONNX from 0 on.

    Returns:
        The high word, signed, and the low one, unsigned. In ONNX, whose runtimes do not all have
        unsigned words: four numbers of 16 bits, the highest first and signed.
    """
    if backend() == "onnx":
        return _pack_digits(bins)
    return _pack(jnp.moveaxis(bins, -1, 0))


def _pack(bins) -> tuple[Integer[Array, "*rows"], ...]:
    high = low = jnp.zeros(bins.shape[1:], jnp.uint32)
    for index, value in enumerate(bins):
        shift, digits = 2 * index, value.astype(jnp.uint32)
        if shift >= 32:
            high += digits << (shift - 32)
            continue
        total = low + (digits << shift)
        carry = (total < low).astype(jnp.uint32)
        # What leaves the low word, with copies of the sign before it.
        high += carry + (value >> min(32 - shift, 31)).astype(jnp.uint32)
        low = total
    return jax.lax.bitcast_convert_type(high, jnp.int32), low


def _pack_digits(bins):
    """Pack in sums that stay below 2^31: of each bin's lower half, and of its upper one."""
    halves = ((0, jax.lax.rem(bins, 2**16)), (8, jax.lax.div(bins, 2**16)))
    powers = jnp.asarray(4 ** np.arange(8), jnp.int32).reshape((1,) * (bins.ndim - 1) + (-1,))
    digits, carry = [], jnp.zeros(bins.shape[:-1], jnp.int32)
    for first in range(0, 32, 8):
        for back, half in halves:
            part = half[..., max(first - back, 0) : max(first - back + 8, 0)]
            carry = carry + (part * powers[..., : part.shape[-1]]).sum(-1)
        digits.append(jax.lax.rem(carry, 2**16))
        carry = jax.lax.div(carry, 2**16)
    *low, high = digits
    return jnp.where(high < 2**15, high, high - 2**16), *low[::-1]


def draw_projections(key: jax.Array, size: int, rounds: int) -> ProjectionDraws:
    """Draw the random numbers of SMYRF's hash.

    Args:
        key: a jax.random key.
        size: channels of a query, D.
        rounds: number of hashing rounds.
    """
    alpha, beta = jax.random.split(key)
    return ProjectionDraws(
        jax.random.normal(alpha, (size + 2, rounds), jnp.float32),
        jax.random.uniform(beta, (rounds,), jnp.float32),
    )


def project_asymmetric(
    q: Float[Array, "B H N D"], k: Float[Array, "B H N D"], draws: ProjectionDraws
) -> tuple[Float[Array, "rounds B H N"], Float[Array, "rounds B H N"]]:
    """Project queries and keys to numbers that are close where their inner product is large.

    The transformation XBOX+ adds two channels, [q, 0, sqrt(MQ^2 + MK^2 - |q|^2)] and
    [k, sqrt(MQ^2 + MK^2 - |k|^2), 0], with the largest norms MQ and MK of the sequence. All vectors
    are then equally long, and distance between a query and a key falls as their product grows.

    Args:
        q: queries. Products are summed in float32 at least; 16 bits meet directions rounded alike.
        k: keys.
        draws: the random directions, shared by all images and heads.

    Returns:
        Projections of queries and of keys.
    """
    q, k = (jax.lax.stop_gradient(x) for x in (q, k))
    q_norms, k_norms = (jnp.square(x.astype(accumulator(x.dtype))).sum(-1) for x in (q, k))
    radius = q_norms.max(-1, keepdims=True) + k_norms.max(-1, keepdims=True)

    def project(x, norms, extra):
        projected = accurate_einsum("bhnd,dr->rbhn", x, draws.alpha[:-2].astype(x.dtype))
        if backend() == "gpu":  # Else the rest is written out first, for the product to add it.
            projected = jax.lax.optimization_barrier(projected)
        missing = jnp.sqrt(radius - norms)[None]
        return projected + _per_round(extra) * missing + _per_round(draws.beta)

    return project(q, q_norms, draws.alpha[-1]), project(k, k_norms, draws.alpha[-2])


def _per_round(values):
    return values.reshape(-1, 1, 1, 1)
