"""Validation on the way: the accuracy over all validation pictures, at the end of epochs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Int, UInt8

from hvit_jax.data.preprocess import normalize
from hvit_jax.data.source import Source
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import Outputs, compare
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.parameters import Tree
from hvit_jax.training.trainer import Trainer


@dataclass(frozen=True)
class Validation:
    """Scores parameters on the validation pictures."""

    trainer: Trainer
    source: Source
    classes: tuple[str, ...]  # In the head's order.

    def measure(self, parameters: Tree, on_batch: Callable[[int], None]) -> tuple[float, float]:
        """Classify every picture once; returns the top-1 accuracy in per cent, and the mean loss.

        `on_batch` is called with the pictures so far; what it raises ends the validation.
        """
        config = self.trainer.config
        # As many pictures at once as a step takes: what trains in memory also validates.
        sharding = BatchSharding(len(self.source), config.batch_size // config.accumulate)
        places = [self.classes.index(name) for name in self.source.classes]
        tally, resolution = Tally(), self.trainer.model_config.image_shape
        with sharding.load(self.source, resolution, config.workers) as batches:
            score(
                functools.partial(self._compiled, parameters),
                batches,
                [places[label] for label in self.source.labels],
                tally,
                sharding,
                self.trainer.placement.shard_batch,
                on_batch=lambda tally: on_batch(tally.totals.images),
            )
        totals = tally.totals
        return 100.0 * totals.correct / totals.images, totals.loss / totals.images

    @functools.cached_property
    def _compiled(self) -> Callable[[Tree, Any, Any], Outputs]:
        def step(parameters: Tree, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]):
            logits, report = self.trainer.model(parameters).classify(normalize(pixels))
            return compare(logits, labels, report)

        return self.trainer.placement.compile(step)


def ends_epoch(step: int, batch_size: int, pictures: int, every: float) -> bool:
    """Tell whether a step is the first to reach a multiple of `every` epochs."""
    before, now = np.floor(np.array([step - 1, step]) * batch_size / (pictures * every))
    return step > 0 and bool(now > before)
