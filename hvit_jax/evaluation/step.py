"""What runs on the device for one batch: normalise, classify, compare with the labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from hvit_jax.data.preprocess import normalize
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.vit import ViT

TOP = 5
# What stands for a label in rows of padding, and of pictures that cannot be read.
PADDING, UNREADABLE = -1, -2
Anywhere = Array | np.ndarray  # On the device while it runs, on the host afterwards.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outputs:
    """What a batch came to, row by row; rows of padding hold numbers without meaning.

    Attributes:
        logits: in float32.
        top1: the class with the largest logit.
        correct: whether that class is the label.
        correct_top5: whether the label is among the five largest logits, or fewer classes.
        loss: cross entropy of the softmax.
        finite: whether all logits are numbers; if not, the picture counts as wrong.
        report: what the method reports of each picture.
        labels: as they were given; negative in rows without a picture.
    """

    logits: Float[Anywhere, "B classes"]
    top1: Int[Anywhere, " B"]
    correct: Bool[Anywhere, " B"]
    correct_top5: Bool[Anywhere, " B"]
    loss: Float[Anywhere, " B"]
    finite: Bool[Anywhere, " B"]
    report: Mapping[str, Float[Anywhere, " B"]]
    labels: Int[Anywhere, " B"]


Step = Callable[[UInt8[Array, "B H W 3"], Int[Array, " B"]], Outputs]


def compare(
    logits: Float[Array, "B classes"],
    labels: Int[Array, " B"],
    report: Mapping[str, Float[Array, " B"]],
) -> Outputs:
    """Compare a batch's logits with its labels.

    Args:
        logits: of the model.
        labels: the right classes, PADDING or UNREADABLE; passed through.
        report: of the method; passed through.
    """
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


def compile_step(model: ViT, batch_size: int, placement: Placement | None = None) -> Step:
    """Compile the evaluation of one batch ahead of time; it never compiles again.

    Args:
        model: a model with a head.
        batch_size: rows of every batch, of all devices together.
        placement: the devices that share a batch; default: JAX's default device. The results lie
            on each of them.

    Returns:
        A function of uint8 pictures and int32 labels. It returns before the device has finished.
    """
    graph, state = nnx.split(model)

    def step(state, pixels, labels):
        logits, report = nnx.merge(graph, state).classify(normalize(pixels))
        return compare(logits, labels, report)

    pixels = jax.ShapeDtypeStruct((batch_size, *model.config.image_shape, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    if placement is None:
        jitted = jax.jit(step)
    else:
        state = placement.replicate(state)
        jitted = placement.compile(step)
    compiled = jitted.lower(state, pixels, labels).compile()
    return functools.partial(compiled, state)
