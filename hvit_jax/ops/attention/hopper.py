"""Attention in a kernel of our own for NVIDIA's Hopper GPUs: where it runs, and its gradient.

It is FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608) for the rows of a vision transformer:
any number of tokens, and a bias of every key, which travels as channels of its own; for cuDNN q, k
and v would be copied to append them.
docs/performance.md has the figures. XLA cannot divide it among devices: that takes `shard_map`, as
in `Placement.compile`; under `jax.jit` alone every device computes the whole batch.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import gather
from hvit_jax.ops.attention import cudnn, meetings, xla
from hvit_jax.ops.attention.heads import Heads, array_of
from hvit_jax.ops.float8 import refuse_gradient
from hvit_jax.ops.grouping import Groups
from hvit_jax.ops.platform import is_exported

# Counts of meetings that exist at once: 2 GB.
_PAIRS = 2**30


def obstacle(dtype: jax.typing.DTypeLike, head_dim: int) -> str | None:
    """Tell why the kernel cannot run for this type and head size on this device, or None."""
    if is_exported():
        return "an exported program holds no kernels of Pallas"
    if problem := cudnn.obstacle(dtype, head_dim):
        return problem  # Its kernels compute the gradient.
    capability = str(getattr(jax.devices()[0], "compute_capability", "0.0"))
    if capability != "9.0":
        return f"compute capability {capability} is not 9.0, Hopper's"
    if head_dim % 16 or head_dim > 128:
        return f"head size {head_dim} is not one of 16, 32 and so on up to 128"
    return None


def attend(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    key_lengths: Int[Array, " B"] | int | None = None,
    factor: Float[Array, " C"] | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend; see `hvit_jax.ops.attention.attend`. A key bias of h = 1 is that of all heads.

    Where lengths differ and there is no bias cuDNN runs, which leaves out keys beyond them, and
    rounds nothing: here they would be a bias. One length of all images leaves them out here too.
    """
    keys = k.shape[1]
    if isinstance(key_lengths, int):
        keys = key_lengths
    elif key_bias is None and key_lengths is not None:
        return cudnn.attend(array_of(q), array_of(k), array_of(v), None, key_lengths)
    else:
        key_bias = xla.mask_keys(key_bias, key_lengths, keys)
    if factor is None:
        return _attend(q, k, v, key_bias, keys)
    return _attend_and_round(q, k, v, key_bias, keys, factor)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _attend_and_round(q, k, v, key_bias, keys: int, factor) -> Array:
    # Imported where it is needed: Pallas takes a quarter of a second.
    from hvit_jax.ops.attention import hopper_kernel

    return hopper_kernel.attend(q, k, v, key_bias, keys, factor)


_attend_and_round.defjvp(refuse_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, key_bias, keys: int) -> Array:
    from hvit_jax.ops.attention import hopper_kernel

    return hopper_kernel.attend(q, k, v, key_bias, keys)


def _forward(q, k, v, key_bias, keys: int):
    """Run cuDNN where there will be a gradient: it has the backward pass."""
    inputs = (q, k, v) if key_bias is None else (q, k, v, key_bias)
    return jax.vjp(functools.partial(_by_cudnn, keys), *inputs)


def _by_cudnn(keys: int, q, k, v, key_bias=None) -> Array:
    lengths = None if keys == k.shape[1] else jnp.full(k.shape[0], keys, jnp.int32)
    return cudnn.attend(array_of(q), array_of(k), array_of(v), key_bias, lengths)


def _backward(keys: int, pull, gradient):
    gradients = pull(gradient)
    return gradients if len(gradients) == 4 else (*gradients, None)


_attend.defvjp(_forward, _backward)


@jax.custom_vjp
def attend_and_score(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and average each key's weights; see `hvit_jax.ops.attention.attend_and_score`."""
    from hvit_jax.ops.attention import hopper_kernel

    return hopper_kernel.attend_and_score(q, k, v, key_bias)


def _score_forward(q, k, v, key_bias):
    return attend_and_score(q, k, v, key_bias), (q, k, v, key_bias)


def _score_backward(inputs, gradients):
    *heads, key_bias = inputs
    arrays, pull = jax.vjp(lambda *heads: [array_of(x) for x in heads], *heads)
    *slopes, of_bias = cudnn.attend_and_score_backward((*arrays, key_bias), gradients)
    return *pull(slopes), of_bias


attend_and_score.defvjp(_score_forward, _score_backward)


def attend_in_clusters(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
    clusters: int,
) -> Float[Array, "B Nq H D"]:
    """Attend inside clusters; see `hvit_jax.ops.attention.attend_in_clusters`.

    The kernel multiplies weights by the counts of meetings.
    """
    arrays = q, k, v, q_clusters, k_clusters
    return meetings.attend_in_clusters(_attend_with_counts, *arrays, clusters, _PAIRS)


def _attend_with_counts(q, k, v, q_clusters, k_clusters, clusters):
    from hvit_jax.ops.attention import hopper_kernel

    shape = q.shape[1] + -q.shape[1] % 8, hopper_kernel.Plan.of(k.shape[1], q.shape[-1]).padded
    counts = meetings.count_meetings(q_clusters, k_clusters, clusters, shape=shape, dtype=q.dtype)
    return hopper_kernel.attend_weighted(q, k, v, counts)


def average_groups(x: Float[Array, "B N H D"], groups: Groups) -> Float[Array, "B K H D"]:
    """Average the vectors of each group; see `hvit_jax.ops.attention.average_groups`."""
    return _average(x, groups.members, groups.counts)


@jax.custom_vjp
def _average(x, members, counts) -> Array:
    from hvit_jax.ops.attention import hopper_means

    return hopper_means.average(x, members, counts.shape[-1])


def _average_forward(x, members, counts):
    return _average(x, members, counts), (members, counts)


def _average_backward(groups, gradient):
    members, counts = (numbers.swapaxes(1, 2) for numbers in groups)
    shares = gradient / jnp.maximum(counts, 1)[..., None].astype(gradient.dtype)
    return gather(shares, members), None, None


_average.defvjp(_average_forward, _average_backward)
