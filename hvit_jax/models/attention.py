"""Attention: one public function over the fused cuDNN kernel and a plain XLA program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.ops.attention_by_head import attention_by_head
from hvit_jax.ops.fused_attention import (
    choose_implementation,
    fused_attention,
    fused_attention_and_column_mean,
)
from hvit_jax.ops.platform import backend
from hvit_jax.ops.precision import accumulator

KeyBias = Float[Array, "B Nk"] | Float[Array, "B H Nk"]


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
        bias = None if key_bias is None else _with_heads(key_bias)
        return fused_attention(q, k, v, bias, key_lengths)
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
    return fused_attention_and_column_mean(q, k, v)


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
