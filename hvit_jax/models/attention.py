"""Attention: one public function over the fused cuDNN kernel and a plain XLA program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.errors import InputError
from hvit_jax.ops.attention_by_head import attention_by_head, column_mean_by_head
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator

IMPLEMENTATIONS = ("auto", "cudnn", "xla")
_FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
# Stands for -inf among head channels, where -inf - (-inf) would make NaN: float16 holds it, and
# divided by sqrt(D) it leaves exactly 0 of exp(score).
_MASKED = -30_000.0

KeyBias = Float[Array, "B Nk"] | Float[Array, "B H Nk"]


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
    capability = getattr(jax.devices()[0], "compute_capability", "0.0")
    if float(capability) < 8.0:
        return f"compute capability {capability} is below 8.0"
    if jnp.dtype(dtype) not in [jnp.dtype(fused) for fused in _FUSED_DTYPES]:
        return f"it needs bfloat16 or float16, the model computes in {jnp.dtype(dtype).name}"
    if head_dim % 8:
        return f"head size {head_dim} is not divisible by 8"
    return None


def attention(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    *,
    key_bias: KeyBias | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B Nq H D"]:
    """Scaled dot-product attention, `softmax(q k^T / sqrt(D) + bias) v` (Vaswani et al. 2017).

    Args:
        q: queries.
        k: keys.
        v: values.
        key_bias: added to the scores of every key, for all queries alike, and for all heads or each
            its own; -inf masks a key.
        key_lengths: how many keys of each image count, the first ones; None: all.
        implementation: "auto", "cudnn" or "xla"; see `choose_implementation`.

    Returns:
        Attended values in the dtype of `q`. The softmax runs in float32.

    Raises:
        InputError: if "cudnn" is asked for where it cannot run.
    """
    if choose_implementation(implementation, q.dtype, q.shape[-1]) == "cudnn":
        return _cudnn_attention(q, k, v, key_bias, key_lengths)
    return _xla_attention(q, k, v, key_bias, key_lengths)


def attention_and_column_mean(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    *,
    implementation: str = "auto",
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and tell how much attention each key gets from all queries on average.

    The weights of a few heads exist at a time, never those of all heads and images together.

    Args:
        q: queries.
        k: keys.
        v: values.
        implementation: as for `attention`.

    Returns:
        Attended values, and for each key the mean of its weights over heads and queries, float32.

    Raises:
        InputError: as for `attention`.
    """
    if choose_implementation(implementation, q.dtype, q.shape[-1]) == "xla":
        return attention_by_head(q, k, v)
    return _cudnn_attention_and_column_mean(q, k, v)


@jax.custom_vjp
def _cudnn_attention_and_column_mean(q, k, v):
    """Let cuDNN's backward pass sum the columns: for a gradient of ones, that of the values.

    Each sum comes once a channel, rounded to q's dtype. Ones that differ a little in every channel
    make these roundings differ, so that the mean over channels and heads is far finer than each.
    """
    attended, pull = jax.vjp(lambda v: _cudnn_attention(q, k, v, None, None), v)
    ones = (1 + jnp.arange(v.shape[-1]) % 128 / 128).astype(q.dtype)
    (sums,) = pull(jnp.broadcast_to(ones, attended.shape))
    sums = sums.astype(jnp.float32).sum((2, 3))
    return attended, sums / (ones.astype(jnp.float32).sum() * q.shape[1] * q.shape[2])


def _column_mean_forward(q, k, v):
    return _cudnn_attention_and_column_mean(q, k, v), (q, k, v)


def _column_mean_backward(inputs, gradients):
    """Differentiate the same figures computed head by head: cuDNN has no second derivative."""

    def same(q, k, v):
        return _cudnn_attention(q, k, v, None, None), column_mean_by_head(q, k)

    return jax.vjp(same, *inputs)[1](gradients)


_cudnn_attention_and_column_mean.defvjp(_column_mean_forward, _column_mean_backward)


def class_attention(
    q: Float[Array, "B Nq H D"], k: Float[Array, "B Nk H D"]
) -> Float[Array, "B Nk-1"]:
    """Compute how much CLS, the first token, attends to each of the others: the mean over heads.

    Args:
        q: queries; only the first is used.
        k: keys, CLS first.

    Returns:
        Weights in float32, CLS's own left out; they sum to less than 1.
    """
    return attention_weights(q[:, :1], k).mean(1)[:, 0, 1:]


def attention_weights(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    *,
    key_bias: KeyBias | None = None,
    key_lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B H Nq Nk"]:
    """Compute the weights themselves, for the few queries whose rows a method looks at.

    Args:
        q: those queries, such as CLS's alone.
        k: all keys.
        key_bias: as for `attention`.
        key_lengths: as for `attention`.

    Returns:
        Softmax weights in float32.
    """
    return jax.nn.softmax(_scores(q, k, key_bias, key_lengths), axis=-1)


def _scores(q, k, key_bias, key_lengths):
    scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=accumulator(q.dtype))
    scores = scores * q.shape[-1] ** -0.5
    bias = _masked_bias(key_bias, key_lengths, k.shape[1])
    return scores if bias is None else scores + bias[:, :, None, :]


def _masked_bias(key_bias, key_lengths, keys) -> Float[Array, "B h Nk"] | None:
    """Join the two ways to weigh keys: those beyond an image's length get -inf."""
    bias = None if key_bias is None else _with_heads(key_bias)
    if key_lengths is None:
        return bias
    real = jnp.arange(keys) < key_lengths[:, None, None]
    return jnp.where(real, 0.0 if bias is None else bias, -jnp.inf)


def _with_heads(key_bias: KeyBias) -> Float[Array, "B h Nk"]:
    return key_bias[:, None] if key_bias.ndim == 2 else key_bias


def _xla_attention(q, k, v, key_bias, key_lengths):
    # On two CPU cores 2 to 3 times faster from 577 tokens on, and no slower at 197.
    if backend() == "cpu":
        bias = _masked_bias(key_bias, key_lengths, k.shape[1])
        return attention_by_head(q, k, v, bias)[0]
    scores = _scores(q, k, key_bias, key_lengths)
    # Dividing the product instead of the weights saves a pass over the N x N array.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1)
    out = jnp.einsum(
        "bhnm,bmhd->bnhd", weights.astype(v.dtype), v, preferred_element_type=accumulator(v.dtype)
    )
    return (out / total.swapaxes(1, 2)[..., None]).astype(q.dtype)


def _cudnn_attention(q, k, v, key_bias, key_lengths):
    """Run the fused kernel; a key bias travels as extra head channels, since it takes none alone.

    Ones in q meet bias * sqrt(D) in k, split into two parts that are exact in q's dtype together.
    """
    size, scale = q.shape[-1], q.shape[-1] ** -0.5
    if key_bias is not None:
        bias = _with_heads(key_bias).swapaxes(1, 2).astype(jnp.float32) / scale
        bias = jnp.maximum(bias, _MASKED)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused(q, k, v, key_lengths, scale):
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=key_lengths, implementation="cudnn"
    )


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
