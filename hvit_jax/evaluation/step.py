"""What runs on the device for one batch: normalise, classify, compare with the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt8

from hvit_jax.data.preprocess import normalize
from hvit_jax.distributed.placement import Placement
from hvit_jax.evaluation.heads import Head
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.vit import ViT
from hvit_jax.ops.arrays import Anywhere
from hvit_jax.pictures import Preprocessing

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
    labels: Int[Anywhere, "B ..."]  # As given; negative in rows without a picture.


Step = Callable[[UInt8[Array, "B H W 3"], Int[Array, "B ..."]], Outputs]


@dataclass(frozen=True)
class CompiledStep:
    """A `Step`: a compiled program, with the weights that it runs with."""

    program: jax.stages.Compiled
    weights: Any

    def __call__(self, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, "B ..."]) -> Outputs:
        """Run a batch."""
        return self.program(self.weights, pixels, labels)


@dataclass(frozen=True)
class Scoring:
    """How pictures are normalised, and how their logits are scored.

    Attributes:
        preprocessing: has the mean and the deviation.
        outputs: those that compete; None for all.
        several: the number of right labels in a row, for pictures that may have several.
        head: makes logits of what the model gives; None where that is logits.
    """

    preprocessing: Preprocessing = Preprocessing()
    outputs: tuple[int, ...] | None = None
    several: tuple[int, ...] = ()
    head: Head | None = None


def compare(
    logits: Float[Array, "B classes"],
    labels: Int[Array, "B ..."],
    report: Mapping[str, Float[Array, " B"]],
    outputs: tuple[int, ...] | None = None,
    *,
    votes: bool = False,
) -> Outputs:
    """Compare a batch's logits with its labels, of which some are PADDING or UNREADABLE.

    Args:
        logits: one row a picture.
        labels: the right output of each; or several, of which any counts, filled up with -1.
        report: of the method.
        outputs: those that compete; None for all.
        votes: whether logits are shares of votes. A class without a vote is never right then, and
            there is no loss, which is NaN.
    """
    logits = logits.astype(jnp.float32)
    finite, competing = jnp.isfinite(logits).all(-1), logits
    if outputs is not None:
        others = np.delete(np.arange(logits.shape[-1]), outputs)
        competing = logits.at[:, others].set(-jnp.inf)
    largest, best = jax.lax.top_k(competing, min(TOP, len(outputs or logits[0])))
    right = (best[:, :, None] == labels.reshape(len(labels), 1, -1)).any(-1)
    if votes:
        right &= largest > 0
    return Outputs(
        logits=logits,
        top1=best[:, 0],
        correct=finite & right[:, 0],
        correct_top5=finite & right.any(-1),
        loss=jnp.full(len(labels), jnp.nan) if votes else _loss(competing, labels),
        finite=finite,
        report=report,
        labels=labels,
    )


def _loss(logits: Float[Array, "B classes"], labels: Int[Array, "B ..."]) -> Float[Array, " B"]:
    """Take the cross entropy of the softmax; several right outputs share one probability."""
    known = jnp.maximum(labels, 0)
    if labels.ndim == 1:
        return optax.softmax_cross_entropy_with_integer_labels(logits, known)
    chosen = jnp.where(labels < 0, -jnp.inf, jnp.take_along_axis(logits, known, axis=-1))
    return jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(chosen, axis=-1)


def compile_step(
    model: ViT, batch_size: int, placement: Placement, scoring: Scoring = Scoring()
) -> CompiledStep:
    """Compile the evaluation of one batch ahead of time; it never compiles again.

    Args:
        model: a model whose outputs are logits, or features that `scoring.head` makes logits of.
        batch_size: rows of every batch, of all devices together.
        placement: the devices that share a batch; the results lie on each of them.
        scoring: how pictures are normalised and scored.

    Returns:
        A function of uint8 pictures and int32 labels. It returns before the device has finished.
    """
    votes = scoring.head is not None and scoring.head.votes

    def finish(outputs, head, labels, report):
        logits = outputs if head is None else head(outputs)
        return compare(logits, labels, report, scoring.outputs, votes=votes)

    return _compile(model, batch_size, placement, scoring, finish)


def compile_features(
    model: ViT, batch_size: int, placement: Placement, preprocessing: Preprocessing
) -> CompiledStep:
    """Compile as `compile_step`, to get features: they stand in the logits' place.

    Nothing is compared; of the other results only `finite` and `labels` have a meaning.
    """

    def finish(features, head, labels, report):
        none = jnp.zeros(len(labels))
        return Outputs(
            logits=features.astype(jnp.float32),
            top1=none.astype(jnp.int32),
            correct=none.astype(bool),
            correct_top5=none.astype(bool),
            loss=none,
            finite=jnp.isfinite(features).all(-1),
            report={},
            labels=labels,
        )

    return _compile(model, batch_size, placement, Scoring(preprocessing), finish)


def _compile(
    model: ViT,
    batch_size: int,
    placement: Placement,
    scoring: Scoring,
    finish: Callable[..., Outputs],
) -> CompiledStep:
    """Compile normalising, the model, and what `finish` makes of its outputs."""
    with_weights, weights = part_weights(model)
    # Bare arrays, since what a head declares of its own does not hold for shapes and shardings.
    of_head, structure = jax.tree.flatten(scoring.head)

    def step(weights, pixels, labels):
        weights, of_head = weights
        images = normalize(pixels, scoring.preprocessing.mean, scoring.preprocessing.std)
        outputs, report = with_weights(weights).classify(images)
        return finish(outputs, structure.unflatten(of_head), labels, report)

    pixels = jax.ShapeDtypeStruct((batch_size, *model.config.image_shape, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((batch_size, *scoring.several), jnp.int32)
    everywhere = placement.replicate((weights, of_head))
    compiled = placement.compile(step).lower(everywhere, pixels, labels).compile()
    return CompiledStep(compiled, everywhere)
