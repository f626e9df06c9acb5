"""What the rounds of SMYRF share: sorted rows, and softmaxes that are joined."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hvit_jax.ops.precision import accumulator


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Attended:
    """A softmax on its way: weighted values, the sum of weights, and what they are relative to."""

    values: Float[Array, "*rows D"]
    total: Float[Array, "*rows"]
    highest: Float[Array, "*rows"]


def nothing(q: Float[Array, "B H N D"]) -> Attended:
    """Start a softmax for every query, over no keys yet."""
    zeros = jnp.zeros(q.shape, accumulator(q.dtype))
    return Attended(zeros, zeros[..., 0], zeros[..., 0] - jnp.inf)


def attend_inside(
    q: Float[Array, "*clusters I D"],
    k: Float[Array, "*clusters J D"],
    v: Float[Array, "*clusters J D"],
    real: Bool[Array, "c 1 J"] | bool = True,
    highest: Float[Array, "*clusters I"] | None = None,
) -> Attended:
    """Attend to the keys of the same cluster.

    Args:
        q: queries.
        k: keys.
        v: values.
        real: which keys of a cluster count; the others are padding.
        highest: what each query's weights are relative to; None: its highest score.
    """
    wide = accumulator(q.dtype)
    scores = jnp.einsum("...id,...jd->...ij", q, k, preferred_element_type=wide)
    scores = jnp.where(real, scores * q.shape[-1] ** -0.5, -jnp.inf)
    if highest is None:
        highest = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.exp(scores - highest[..., None])
    values = jnp.einsum(
        "...ij,...jd->...id", weights.astype(v.dtype), v, preferred_element_type=wide
    )
    return Attended(values, weights.sum(-1), highest)


def _join(first: Attended, second: Attended) -> Attended:
    """Join two softmaxes over different keys to the softmax over both."""
    highest = jnp.maximum(first.highest, second.highest)
    ours, theirs = jnp.exp(first.highest - highest), jnp.exp(second.highest - highest)
    values = ours[..., None] * first.values + theirs[..., None] * second.values
    return Attended(values, ours * first.total + theirs * second.total, highest)


def join_rounds(
    joined: Attended, rounds: Attended, q_orders: Int[Array, "rounds B H N"]
) -> Attended:
    """Put the queries of some rounds back in order, and join the rounds."""
    places = jnp.argsort(q_orders)
    for index in range(len(places)):
        one = jax.tree.map(lambda x, i=index: take_rows(x[i], places[i]), rounds)
        joined = _join(joined, one)
    return joined


def finish(joined: Attended, dtype: jax.typing.DTypeLike) -> Float[Array, "B H N D"]:
    """Normalise a softmax that has met all its keys."""
    return (joined.values / joined.total[..., None]).astype(dtype)


def sort_rows(
    x: Float[Array, "B H N *D"], orders: Int[Array, "rounds B H N"]
) -> Float[Array, "rounds B H N *D"]:
    """Sort rows in the order of every round."""
    return jax.vmap(take_rows, (None, 0))(x, orders)


def take_rows(x: Float[Array, "B H M *D"], order: Int[Array, "B H N"]) -> Float[Array, "B H N *D"]:
    """Take rows in one order."""
    places = order.reshape(*order.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, places, axis=2, mode="promise_in_bounds")
