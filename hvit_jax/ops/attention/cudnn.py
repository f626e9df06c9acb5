"""Attention in cuDNN's fused kernels: where they run, and what they compute beside attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.arrays import pad_end
from hvit_jax.ops.attention import meetings, xla
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import rounded

_DTYPES = (jnp.bfloat16, jnp.float16)
# Stands for -inf, where -inf - (-inf) would make NaN: float16 holds it, and divided by sqrt(D) it
# still leaves exactly 0 of exp(score).
_MASKED = -30_000.0
# Numbers in a bias of all pairs at once: 256 MB.
_PAIRS = 2**27


def obstacle(dtype: jax.typing.DTypeLike, head_dim: int) -> str | None:
    """Tell why the kernels cannot run for this type and head size on this device, or None."""
    if backend() != "gpu":
        return f"the device is a {backend()}, not an NVIDIA GPU"
    capability = str(getattr(jax.devices()[0], "compute_capability", "0.0"))
    if not capability.replace(".", "").isdigit():
        return f"the device is a GPU of kind {capability}, not one of NVIDIA"
    if float(capability) < 8.0:
        return f"compute capability {capability} is below 8.0"
    if jnp.dtype(dtype) not in [jnp.dtype(fused) for fused in _DTYPES]:
        return f"it needs bfloat16 or float16, the model computes in {jnp.dtype(dtype).name}"
    if head_dim % 8:
        return f"head size {head_dim} is not divisible by 8"
    # A key bias takes eight more.
    most = (256 if float(capability) >= 9.0 else 128) - 8
    if head_dim > most:
        return f"head size {head_dim} is above {most}"
    return None


def attend(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend; see `hvit_jax.ops.attention.attend`. A key bias of h = 1 is that of all heads.

    The kernel takes no bias of keys alone, so it travels as extra head channels: ones in q meet
    bias * sqrt(D) in k, split into two parts that are exact in q's dtype together.
    """
    size, scale = q.shape[-1], q.shape[-1] ** -0.5
    if key_bias is not None:
        bias = key_bias.swapaxes(1, 2).astype(jnp.float32) / scale
        bias = jnp.maximum(bias, _MASKED)
        high = rounded(bias, k.dtype)
        parts = jnp.stack([high, bias - high], axis=-1).astype(k.dtype)
        parts = jnp.broadcast_to(parts, (*k.shape[:-1], 2))
        ones = jnp.ones((*q.shape[:-1], 2), q.dtype)
        k = jnp.concatenate([k, pad_end(parts, 6, axis=-1)], axis=-1)
        q = jnp.concatenate([q, pad_end(ones, 6, axis=-1)], axis=-1)
        v = pad_end(v, 8, axis=-1)
    return _attend(q, k, v, key_lengths, scale)[..., :size]


def _kernel(q, k, v, key_lengths, scale) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )


_attend = jax.custom_vjp(_kernel, nondiff_argnums=(4,))


def _attend_forward(q, k, v, key_lengths, scale):
    """Run the kernel so that it can be differentiated: JAX wants even numbers of tokens then."""

    def padded(q, k, v):
        lengths = key_lengths
        if k.shape[1] % 2 and lengths is None:
            lengths = jnp.full(k.shape[0], k.shape[1], jnp.int32)
        rows, keys, values = (pad_end(x, x.shape[1] % 2, axis=1) for x in (q, k, v))
        return _kernel(rows, keys, values, lengths, scale)[:, : q.shape[1]]

    return jax.vjp(padded, q, k, v)


def _attend_backward(scale, pull, gradient):
    return *pull(gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def attend_and_score(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and average each key's weights; see `hvit_jax.ops.attention.attend_and_score`.

    The backward pass sums columns: for a gradient of ones, that of the values.
    Each sum comes once a channel, rounded to q's dtype. Ones that differ a little in every channel
    make these roundings differ, so that the mean over channels and heads is far finer than each.
    """
    attended, pull = jax.vjp(lambda v: attend(q, k, v, key_bias), v)
    ones = (1 + jnp.arange(v.shape[-1]) % 128 / 128).astype(q.dtype)
    (sums,) = pull(jnp.broadcast_to(ones, attended.shape))
    sums = sums.astype(jnp.float32).sum((2, 3))
    return attended, sums / (ones.astype(jnp.float32).sum() * q.shape[1] * q.shape[2])


def _attend_and_score_forward(q, k, v, key_bias):
    return attend_and_score(q, k, v, key_bias), (q, k, v, key_bias)


def attend_and_score_backward(inputs, gradients):
    """Differentiate the same figures computed head by head: cuDNN has no second derivative."""

    def same(*inputs):
        q, k, _, *key_bias = inputs
        return attend(*inputs), xla.column_mean(q, k, *key_bias)

    given = [x for x in inputs if x is not None]
    gradients = jax.vjp(same, *given)[1](gradients)
    return *gradients, *[None] * (4 - len(given))


attend_and_score.defvjp(_attend_and_score_forward, attend_and_score_backward)


def attend_in_clusters(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
    clusters: int,
    at_once: int = _PAIRS,
) -> Float[Array, "B Nq H D"]:
    """Attend inside clusters, with logarithms of the counts of meetings as a bias.

    See `hvit_jax.ops.attention.attend_in_clusters`. That bias has so many numbers `at_once`, or
    those of one image if it has more.
    """
    arrays = q, k, v, q_clusters, k_clusters
    return meetings.attend_in_clusters(_attend_with_counts, *arrays, clusters, at_once)


def _attend_with_counts(q, k, v, q_clusters, k_clusters, clusters):
    # The kernel loads 16 bytes of a row at a time.
    rows, keys, values = (pad_end(x, -x.shape[1] % 8, axis=1) for x in (q, k, v))
    shape = rows.shape[1], keys.shape[1]
    counts = meetings.count_meetings(q_clusters, k_clusters, clusters, shape=shape, dtype=q.dtype)
    bias = jnp.where(counts > 0, jnp.log(counts.astype(jnp.float32)), _MASKED).astype(q.dtype)
    out = jax.nn.dot_product_attention(rows, keys, values, bias, implementation="cudnn")
    return out[:, : q.shape[1]]
