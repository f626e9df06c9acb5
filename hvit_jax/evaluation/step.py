"""What runs on the device for one batch: normalise, classify, compare with the labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from hvit_jax.data.preprocess import normalize
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.vit import ViT, part_weights
from hvit_jax.ops.arrays import Anywhere

TOP = 5
# What stands for a label in rows of padding, and of pictures that cannot be read.
PADDING, UNREADABLE = -1, -2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outputs:
    """What a batch came to, row by row; rows without a picture hold numbers without meaning."""

    logits: Float[Anywhere, "B classes"]  # In float32.
    top1: Int[Anywhere, " B"]
    correct: Bool[Anywhere, " B"]
    correct_top5: Bool[Anywhere, " B"]  # Among the five largest logits, or fewer classes.
    loss: Float[Anywhere, " B"]  # Cross entropy of the softmax.
    finite: Bool[Anywhere, " B"]  # If a logit is no number, the picture counts as wrong.
    report: Mapping[str, Float[Anywhere, " B"]]  # Of the method.
    labels: Int[Anywhere, " B"]  # As they were given; negative in rows without a picture.


Step = Callable[[UInt8[Array, "B H W 3"], Int[Array, " B"]], Outputs]


def compare(
    logits: Float[Array, "B classes"],
    labels: Int[Array, " B"],
    report: Mapping[str, Float[Array, " B"]],
) -> Outputs:
    """Compare a batch's logits with its labels, of which some are PADDING or UNREADABLE."""
    logits = logits.astype(jnp.float32)
    _, best = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
    finite = jnp.isfinite(logits).all(-1)
    return Outputs(
        logits=logits,
        top1=best[:, 0],
        correct=finite & (best[:, 0] == labels),
        correct_top5=finite & (best == labels[:, None]).any(-1),
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0)),
        finite=finite,
        report=report,
        labels=labels,
    )


def compile_step(model: ViT, batch_size: int, placement: Placement) -> Step:
    """Compile the evaluation of one batch ahead of time; it never compiles again.

    Args:
        model: a model with a head.
        batch_size: rows of every batch, of all devices together.
        placement: the devices that share a batch; the results lie on each of them.

    Returns:
        A function of uint8 pictures and int32 labels. It returns before the device has finished.
    """
    with_weights, weights = part_weights(model)

    def step(weights, pixels, labels):
        logits, report = with_weights(weights).classify(normalize(pixels))
        return compare(logits, labels, report)

    pixels = jax.ShapeDtypeStruct((batch_size, *model.config.image_shape, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    weights = placement.replicate(weights)
    compiled = placement.compile(step).lower(weights, pixels, labels).compile()
    return functools.partial(compiled, weights)
