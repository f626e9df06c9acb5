"""Attention in cuDNN's fused kernels: where they run, and what they compute beside attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.attention_by_head import column_mean_by_head
from hvit_jax.ops.platform import backend

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
_FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
# Stands for -inf, where -inf - (-inf) would make NaN: float16 holds it, and divided by sqrt(D) it
# still leaves exactly 0 of exp(score).
MASKED = -30_000.0


def choose_implementation(requested: str, dtype: jax.typing.DTypeLike, head_dim: int) -> str:
    """Name the attention that will run: "cudnn" or "xla".

    cuDNN's fused attention needs an NVIDIA GPU of compute capability 8.0 or newer, float16 or
    bfloat16, and a head size divisible by 8.

    Args:
        requested: "auto" takes cuDNN where it can run; the other two force one.
        dtype: the type of q, k and v.
        head_dim: channels of one head.

    Raises:
        InputError: for an unknown name, or "cudnn" where it cannot run.
    """
    check_implementation(requested)
    if requested == "xla":
        return "xla"
    obstacle = _cudnn_obstacle(dtype, head_dim)
    if obstacle and requested == "cudnn":
        raise InputError(f"attention 'cudnn' cannot run here: {obstacle}; use 'auto' or 'xla'")
    return "xla" if obstacle else "cudnn"


def check_implementation(requested: str) -> None:
    """Refuse a name that `attention` does not know.

    Raises:
        InputError: for an unknown name.
    """
    if requested not in IMPLEMENTATIONS:
        raise InputError(f"attention must be one of {', '.join(IMPLEMENTATIONS)}: {requested!r}")


def _cudnn_obstacle(dtype: jax.typing.DTypeLike, head_dim: int) -> str | None:
    if backend() != "gpu":
        return f"the device is a {backend()}, not an NVIDIA GPU"
    capability = str(getattr(jax.devices()[0], "compute_capability", "0.0"))
    if not capability.replace(".", "").isdigit():
        return f"the device is a GPU of kind {capability}, not one of NVIDIA"
    if float(capability) < 8.0:
        return f"compute capability {capability} is below 8.0"
    if jnp.dtype(dtype) not in [jnp.dtype(fused) for fused in _FUSED_DTYPES]:
        return f"it needs bfloat16 or float16, the model computes in {jnp.dtype(dtype).name}"
    if head_dim % 8:
        return f"head size {head_dim} is not divisible by 8"
    # A key bias takes eight more.
    most = (256 if float(capability) >= 9.0 else 128) - 8
    if head_dim > most:
        return f"head size {head_dim} is above {most}"
    return None


def fused_attention(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend in cuDNN; a key bias travels as extra head channels, since it takes none alone.

    Ones in q meet bias * sqrt(D) in k, split into two parts that are exact in q's dtype together.

    Args:
        q: queries, in float16 or bfloat16.
        k: keys.
        v: values.
        key_bias: added to the scores of every key, in each head or (h = 1) in all; -inf masks one.
        key_lengths: how many keys of each image count, the first ones.
    """
    size, scale = q.shape[-1], q.shape[-1] ** -0.5
    if key_bias is not None:
        bias = key_bias.swapaxes(1, 2).astype(jnp.float32) / scale
        bias = jnp.maximum(bias, MASKED)
        high = bias.astype(k.dtype)
        low = (bias - high.astype(jnp.float32)).astype(k.dtype)
        six = ((0, 0), (0, 0), (0, 0), (0, 6))
        parts = jnp.stack([high, low], axis=-1)
        extra = jnp.pad(jnp.broadcast_to(parts, (*k.shape[:-1], 2)), six)
        ones = jnp.pad(jnp.ones((*q.shape[:-1], 2), q.dtype), six)
        q = jnp.concatenate([q, ones], axis=-1)
        k = jnp.concatenate([k, extra], axis=-1)
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 8)))
    return _fused(q, k, v, key_lengths, scale)[..., :size]


def _attend(q, k, v, key_lengths, scale) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )


_fused = jax.custom_vjp(_attend, nondiff_argnums=(4,))


def _fused_forward(q, k, v, key_lengths, scale):
    """Run the kernel so that it can be differentiated: JAX wants even numbers of tokens then."""

    def padded(q, k, v):
        spare, spare_keys = q.shape[1] % 2, k.shape[1] % 2
        lengths = key_lengths
        if spare_keys and lengths is None:
            lengths = jnp.full(k.shape[0], k.shape[1], jnp.int32)
        k, v = (jnp.pad(x, ((0, 0), (0, spare_keys), (0, 0), (0, 0))) for x in (k, v))
        rows = jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0)))
        out = jax.nn.dot_product_attention(
            rows, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
        )
        return out[:, : q.shape[1]]

    return jax.vjp(padded, q, k, v)


def _fused_backward(scale, pull, gradient):
    return *pull(gradient), None


_fused.defvjp(_fused_forward, _fused_backward)


def fused_attention_with_bias(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    bias: Float[Array, "B H Nq Nk"],
) -> Float[Array, "B Nq H D"]:
    """Attend in cuDNN with a bias of every pair; not to be differentiated.

    Args:
        q: queries, in float16 or bfloat16.
        k: keys.
        v: values.
        bias: added to the scores, in the dtype of `q`; `MASKED` hides a key from a query.
    """
    # The kernel loads 16 bytes of a row at a time.
    spare_rows, spare_keys = (-x.shape[1] % 8 for x in (q, k))
    rows = jnp.pad(q, ((0, 0), (0, spare_rows), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, spare_keys), (0, 0), (0, 0))) for x in (k, v))
    padding = (0, 0), (0, 0), (0, spare_rows), (0, spare_keys)
    bias = jnp.pad(bias, padding, constant_values=MASKED)
    out = jax.nn.dot_product_attention(rows, k, v, bias, implementation="cudnn")
    return out[:, : q.shape[1]]


@jax.custom_vjp
def fused_attention_and_column_mean(
    q: Float[Array, "B Nq H D"], k: Float[Array, "B Nk H D"], v: Float[Array, "B Nk H D"]
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend in cuDNN, and average each key's weights over heads and queries.

    The backward pass sums columns: for a gradient of ones, that of the values.
    Each sum comes once a channel, rounded to q's dtype. Ones that differ a little in every channel
    make these roundings differ, so that the mean over channels and heads is far finer than each.
    """
    attended, pull = jax.vjp(lambda v: fused_attention(q, k, v), v)
    ones = (1 + jnp.arange(v.shape[-1]) % 128 / 128).astype(q.dtype)
    (sums,) = pull(jnp.broadcast_to(ones, attended.shape))
    sums = sums.astype(jnp.float32).sum((2, 3))
    return attended, sums / (ones.astype(jnp.float32).sum() * q.shape[1] * q.shape[2])


def _column_mean_forward(q, k, v):
    return fused_attention_and_column_mean(q, k, v), (q, k, v)


def _column_mean_backward(inputs, gradients):
    """Differentiate the same figures computed head by head: cuDNN has no second derivative."""

    def same(q, k, v):
        return fused_attention(q, k, v), column_mean_by_head(q, k)

    return jax.vjp(same, *inputs)[1](gradients)


fused_attention_and_column_mean.defvjp(_column_mean_forward, _column_mean_backward)
