"""Attention: what methods ask for. How it is computed stands in one file a backend.

Every function takes `implementation`: "auto" runs the fastest that can run here, the others force
one. "hopper" is a kernel of our own for Hopper GPUs, and cuDNN's for what it does not compute;
"cudnn" runs cuDNN's fused kernels, "xla" what XLA compiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hvit_jax.config import ATTENTION
from hvit_jax.errors import InputError
from hvit_jax.ops.arrays import softmax
from hvit_jax.ops.attention import cudnn, hopper, onnx, xla
from hvit_jax.ops.attention.heads import Heads, array_of
from hvit_jax.ops.float8 import FLOAT8, to_float8
from hvit_jax.ops.grouping import Groups, group_means, member_codes
from hvit_jax.ops.platform import backend

_KERNELS = {"hopper": hopper, "cudnn": cudnn, "onnx": onnx, "xla": xla}
KeyBias = Float[Array, "B Nk"] | Float[Array, "B H Nk"]


def choose_implementation(requested: str, dtype: jax.typing.DTypeLike, head_dim: int) -> str:
    """Name the attention that will run: "hopper", "cudnn" or "xla"; in ONNX files it is "onnx".

    Ours needs an NVIDIA GPU of compute capability 9.0, float16 or bfloat16, and a head size
    divisible by 16 up to 128. cuDNN's needs compute capability 8.0 or newer, the same types, and a
    head size divisible by 8.

    Args:
        requested: "auto", "hopper", "cudnn" or "xla".
        dtype: the type of q, k and v.
        head_dim: channels of one head.

    Raises:
        InputError: for an unknown name, or "hopper" or "cudnn" where it cannot run.
    """
    if requested not in ATTENTION:
        raise InputError(f"attention must be one of {', '.join(ATTENTION)}: {requested!r}")
    if backend() == "onnx":
        return "onnx"
    if requested == "xla":
        return "xla"
    for name, kernels in (("hopper", hopper), ("cudnn", cudnn)):
        if requested not in ("auto", name):
            continue
        obstacle = kernels.obstacle(dtype, head_dim)
        if obstacle is None:
            return name
        if requested == name:
            raise InputError(f"attention {name!r} cannot run here: {obstacle}; use 'auto' or 'xla'")
    return "xla"


def _chosen(requested: str, x: Heads | Float[Array, "B N H D"]) -> str:
    return choose_implementation(requested, x.dtype, x.shape[-1])


def attend(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    *,
    key_bias: KeyBias | None = None,
    key_lengths: Int[Array, " B"] | int | None = None,
    factor: Float[Array, " C"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "B Nq H D"]:
    """Scaled dot-product attention, `softmax(q k^T / sqrt(D) + bias) v` (Vaswani et al. 2017).

    Args:
        q: queries.
        k: keys.
        v: values.
        key_bias: added to the scores of every key, for all queries alike, and for all heads or each
            its own; -inf masks a key.
        key_lengths: how many keys of each image count, the first ones; one number is that of every
            image; None: all.
        factor: what the channels of all heads are multiplied by, powers of two, before they are
            rounded to float8 as by `ops.float8.to_float8`; None: they are not.
        implementation: "auto", "hopper", "cudnn" or "xla".

    Returns:
        Attended values in the dtype of `q`, or in e4m3. The softmax runs in float32.

    Raises:
        InputError: if "hopper" or "cudnn" is asked for where it cannot run.
    """
    chosen, bias = _chosen(implementation, q), _with_heads(key_bias)
    if chosen == "hopper":
        attended = hopper.attend(q, k, v, bias, key_lengths, factor)
    else:
        if isinstance(key_lengths, int):
            key_lengths = jnp.full(q.shape[0], key_lengths, jnp.int32)
        attended = _KERNELS[chosen].attend(*map(array_of, (q, k, v)), bias, key_lengths)
    if factor is None or attended.dtype == FLOAT8:
        return attended
    return to_float8(attended, factor.reshape(1, 1, *q.shape[2:]))


def attend_and_score(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    *,
    key_bias: KeyBias | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and tell how much attention each key gets from all queries on average.

    The weights of a few heads exist at a time, never those of all heads and images together.

    Args:
        q: queries.
        k: keys.
        v: values.
        key_bias: as for `attend`.
        implementation: as for `attend`.

    Returns:
        Attended values, and for each key the mean of its weights over heads and queries, float32.

    Raises:
        InputError: as for `attend`.
    """
    chosen, bias = _chosen(implementation, q), _with_heads(key_bias)
    if chosen == "hopper":
        return hopper.attend_and_score(q, k, v, bias)
    return _KERNELS[chosen].attend_and_score(*map(array_of, (q, k, v)), bias)


def attend_in_clusters(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    q_clusters: Int[Array, "B H R Nq"],
    k_clusters: Int[Array, "B H R Nk"],
    *,
    clusters: int,
    implementation: str = "auto",
) -> Float[Array, "B Nq H D"]:
    """Attend inside clusters, of which every query and key has one in each of R rounds.

    A pair's weight is multiplied by the number of rounds in which the two share a cluster; pairs
    that never do have none.

    Args:
        q: queries.
        k: keys.
        v: values.
        q_clusters: numbers of the queries' clusters.
        k_clusters: numbers of the keys' clusters. Every query meets at least one key.
        clusters: how many there are in a round.
        implementation: as for `attend`. In cuDNN logarithms of the counts are rounded to the dtype
            of `q`, which in bfloat16 changes weights by up to 0.8 %; in "hopper" only counts above
            256 are, in bfloat16, by up to 0.4 %.

    Returns:
        Attended values in the dtype of `q`.

    Raises:
        InputError: as for `attend`.
    """
    chosen = _chosen(implementation, q)
    if chosen == "hopper":
        return hopper.attend_in_clusters(q, k, v, q_clusters, k_clusters, clusters)
    q, k, v = (array_of(x) for x in (q, k, v))
    if chosen == "cudnn":
        return cudnn.attend_in_clusters(q, k, v, q_clusters, k_clusters, clusters)
    return _KERNELS[chosen].attend_in_clusters(q, k, v, q_clusters, k_clusters)


def average_groups(
    x: Heads | Float[Array, "B N H D"], groups: Groups, *, implementation: str = "auto"
) -> Float[Array, "B K H D"]:
    """Average the vectors of each group.

    On a Hopper GPU a kernel of our own does so. On others cuDNN's attention is faster than products
    of chunks: queries that stand for groups attend to their members alone.

    Args:
        x: queries, keys or values, in the tokens' order.
        groups: their groups, which may stem from other vectors of the same tokens.
        implementation: as for `attend`.

    Returns:
        Means in the dtype of `x`. Those of unused groups are finite, and mean nothing.

    Raises:
        InputError: as for `attend`.
    """
    x, chosen = array_of(x), _chosen(implementation, x)
    if chosen == "hopper":
        return hopper.average_groups(x, groups)
    size = x.shape[-1]
    if chosen in ("onnx", "xla") or groups.counts.shape[-1] > 2**size:
        return group_means(x, groups)
    queries, keys = member_codes(groups, size=size, dtype=x.dtype)
    return cudnn.attend(queries, keys, x)


def class_attention(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    *,
    prefix: int,
    key_bias: KeyBias | None = None,
) -> Float[Array, "B P"]:
    """Compute how much CLS, the first token, attends to each patch: the mean over heads.

    Args:
        q: queries; only the first is used.
        k: keys, the prefix first.
        prefix: tokens before the patches.
        key_bias: as for `attend`.

    Returns:
        Weights in float32, the prefix's left out; they sum to less than 1.
    """
    return attention_weights(q[:, :1], k, key_bias=key_bias).mean(1)[:, 0, prefix:]


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
        key_bias: as for `attend`.
        key_lengths: as for `attend`.

    Returns:
        Softmax weights in float32.
    """
    return softmax(xla.scores(q, k, _with_heads(key_bias), key_lengths))


def _with_heads(key_bias: KeyBias | None) -> Float[Array, "B h Nk"] | None:
    if key_bias is None:
        return None
    return key_bias[:, None] if key_bias.ndim == 2 else key_bias
