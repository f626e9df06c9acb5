"""What a GPU's kernels share to attend inside clusters: they count the meetings of all pairs first.

Counts exist for a few images at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from hvit_jax.ops.arrays import largest_divisor, pad_end
from hvit_jax.ops.attention import xla
from hvit_jax.ops.attention.heads import Heads, array_of
from hvit_jax.ops.precision import smallest_integer

# Rounds that one number holds a digit of.
_BITS = 32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 6, 7))
def attend_in_clusters(
    attend: Callable[..., Array],
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
    clusters: int,
    at_once: int,
) -> Float[Array, "B Nq H D"]:
    """Attend inside clusters; see `hvit_jax.ops.attention.attend_in_clusters`.

    Args:
        attend: takes the other arguments but the last, of some images.
        q: queries.
        k: keys.
        v: values.
        q_clusters: numbers of the queries' clusters.
        k_clusters: numbers of the keys' clusters.
        clusters: how many there are in a round.
        at_once: so many counts exist, or those of one image if it has more.
    """

    def some_images(images):
        return attend(*images, clusters)

    batch, size, heads, _ = q.shape
    arrays = q, k, v, q_clusters, k_clusters
    pairs = heads * size * k.shape[1]
    group = largest_divisor(batch, at_once // pairs) if isinstance(batch, int) else 1
    groups = jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), arrays)
    return jax.lax.map(some_images, groups).reshape(q.shape)


def _forward(*inputs):
    return attend_in_clusters(*inputs), inputs[1:6]


def _backward(attend, clusters, at_once, inputs, gradient):
    """Differentiate the same figures computed head by head: no gradient needs the counts then."""
    q, k, v, *numbers = inputs

    def same(q, k, v):
        return xla.attend_in_clusters(array_of(q), array_of(k), array_of(v), *numbers)

    return *jax.vjp(same, q, k, v)[1](gradient), None, None


attend_in_clusters.defvjp(_forward, _backward)


def count_meetings(
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
    clusters: int,
    *,
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "B H rows columns"]:
    """Count for every query and key the rounds in which their clusters meet.

    32 rounds are compared at once: a word of 32 bits holds one binary digit of a token's numbers of
    clusters in that many rounds. Two tokens meet in a round if no digit differs.

    Args:
        q_clusters: numbers of the queries' clusters.
        k_clusters: numbers of the keys' clusters.
        clusters: how many there are in a round.
        shape: rows and columns of the result; what lies beyond the queries and keys is 0.
        dtype: of the result. bfloat16 rounds what is above 256.
    """
    # Tokens that are appended are in clusters where no other is.
    q_words = _words(q_clusters, shape[0], clusters, clusters + 1)
    k_words = _words(k_clusters, shape[1], clusters + 1, clusters + 1)
    # Inverted, a word leaves ones where digits are equal. All are written out, or else they would
    # be collected again for every pair.
    q_words, k_words = jax.lax.optimization_barrier(([~word for word in q_words], k_words))
    counts = jnp.zeros((), jnp.uint32)
    for index, (of_q, of_k) in enumerate(zip(q_words, k_words, strict=True)):
        rounds = min(_BITS, q_clusters.shape[2] - index * _BITS)
        equal = of_q[..., :, None] ^ of_k[..., None, :]
        meet = jax.lax.reduce(equal, np.uint32(2**rounds - 1), jax.lax.bitwise_and, (0,))
        counts += jax.lax.population_count(meet)
    return counts.astype(dtype)


def _words(
    numbers: Int[Array, "B H R N"], size: int, beyond: int, most: int
) -> list[UInt32[Array, "digits B H size"]]:
    """Collect binary digits of a token's numbers up to `most`, the first round's lowest."""
    numbers = numbers.astype(smallest_integer(most))
    numbers = pad_end(numbers, size - numbers.shape[-1], axis=-1, constant_values=beyond)
    # Written out while they are narrow.
    numbers = jax.lax.optimization_barrier(numbers)
    digits = jnp.arange(most.bit_length(), dtype=jnp.uint32).reshape(-1, 1, 1, 1)
    words = []
    for index in range(numbers.shape[2]):
        ones = numbers[:, :, index].astype(jnp.uint32) >> digits & 1
        if index % _BITS == 0:
            words.append(ones)
        else:
            words[-1] |= ones << index % _BITS
    return words
