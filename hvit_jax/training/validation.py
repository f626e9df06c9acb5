"""Validation on the way: accuracy and loss over all validation pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Int, UInt8

from hvit_jax.data.source import Source
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import Outputs, compare
from hvit_jax.evaluation.tally import Tally, Totals
from hvit_jax.models.parameters import Tree
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.trainer import Trainer

# Classifies every validation picture once, by some parameters. The other argument is called with
# the pictures so far; what it raises ends the validation.
Validate = Callable[[Tree, Callable[[int], None]], Totals]


def make_validate(
    trainer: Trainer, source: Source, classes: tuple[str, ...], config: TrainConfig
) -> Validate:
    """Make the function that validates.

    Args:
        trainer: makes the model.
        source: the pictures to validate on.
        classes: the model's, in the head's order; those of `source` are the same in any order.
        config: the run's.
    """
    places = {name: place for place, name in enumerate(classes)}
    outputs = np.array([places[name] for name in source.classes], np.int32)
    labels = outputs[list(source.labels)]
    # As many pictures at once as a step takes: what trains in memory also validates.
    sharding = BatchSharding(len(source), config.batch_size // config.accumulate)
    labels = labels[list(sharding.indices)]

    def step(
        parameters: Tree, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]
    ) -> Outputs:
        logits, report = trainer.model(parameters).classify(trainer.normalize(pixels))
        return compare(logits, labels, report)

    compiled = trainer.placement.compile(step)

    def validate(parameters: Tree, on_batch: Callable[[int], None]) -> Totals:
        tally = Tally()
        size, preprocessing = trainer.sizes.image_shape, trainer.preprocessing
        with sharding.load(source, size, config.workers, preprocessing) as batches:
            score(
                functools.partial(compiled, parameters),
                batches,
                labels,
                tally,
                trainer.placement.shard_batch,
                skip_unreadable=config.on_error == "skip",
                on_batch=lambda tally: on_batch(tally.totals.images),
            )
        return tally.totals

    return validate
