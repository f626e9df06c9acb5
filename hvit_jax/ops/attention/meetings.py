"""What a GPU's kernels share to attend inside clusters: they count the meetings of all pairs first.

Counts are products of one-hot codes. They exist for a few images at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import largest_divisor, pad_end
from hvit_jax.ops.attention import xla
from hvit_jax.ops.attention.heads import Heads, array_of
from hvit_jax.ops.float8 import FLOAT8


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
        at_once: so many counts or numbers of codes exist, or those of one image if it has more.
    """

    def some_images(images):
        return attend(*images, clusters)

    batch, size, heads, _ = q.shape
    arrays = q, k, v, q_clusters, k_clusters
    width = max(k.shape[1], q_clusters.shape[2] * clusters)
    group = (
        largest_divisor(batch, at_once // (heads * size * width)) if isinstance(batch, int) else 1
    )
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
    float8: bool = False,
) -> Float[Array, "B H rows columns"]:
    """Count for every query and key the rounds in which their clusters meet.

    That is eight times as fast on a GPU as to compare the clusters of all pairs.

    Args:
        q_clusters: numbers of the queries' clusters.
        k_clusters: numbers of the keys' clusters.
        clusters: how many there are in a round.
        shape: rows and columns of the result; what lies beyond the queries and keys is 0.
        dtype: of the result. bfloat16 rounds what is above 256.
        float8: whether to multiply in 8 bits, which is twice as fast where the device can, and as
            exact, since codes are ones and zeros.
    """
    kind = FLOAT8 if float8 else dtype
    pairs = zip((q_clusters, k_clusters), shape, strict=True)
    q_codes, k_codes = (_codes(x, size - x.shape[-1], clusters, kind) for x, size in pairs)
    return jnp.einsum("bhnc,bhmc->bhnm", q_codes, k_codes, preferred_element_type=dtype)


def _codes(numbers: Int[Array, "B H R N"], spare: int, clusters: int, dtype) -> Array:
    """Write a token's clusters as ones among zeros; tokens that are appended are in no cluster."""
    numbers = pad_end(numbers, spare, axis=-1, constant_values=clusters).swapaxes(-1, -2)
    # Written out, so that what is appended is no case of its own for every code.
    numbers = jax.lax.optimization_barrier(numbers)
    # Neighbours in memory are rounds, whose numbers are read together.
    codes = numbers[..., None, :] == jnp.arange(clusters)[None, None, None, :, None]
    if dtype == FLOAT8:
        # By its bits: XLA rounds to 8 bits in 40 instructions, of a truth value too.
        one = np.ones((), FLOAT8).view(np.uint8)
        codes = jax.lax.bitcast_convert_type(jnp.where(codes, one, np.uint8(0)), FLOAT8)
    return codes.astype(dtype).reshape(*codes.shape[:-2], -1)
