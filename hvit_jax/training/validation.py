"""Validation on the way: the accuracy over all validation pictures, at the end of epochs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Int, UInt8

from hvit_jax.data.folder import SPLITS, ImageFolder, read_folder
from hvit_jax.data.preprocess import normalize
from hvit_jax.data.source import Source, open_source
from hvit_jax.errors import InputError
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import Outputs, compare
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.parameters import Tree
from hvit_jax.training.trainer import Trainer

NONE = "none"


def find_pictures(data: str, wanted: str | None, training: ImageFolder) -> Source | None:
    """Open the pictures to validate on.

    Args:
        data: what the training pictures were read from.
        wanted: what is asked for: a folder, `tfds:NAME[:SPLIT]`, "none", or None for the `val/` or
            `img_val/` beside `train/`, if there is one.
        training: the training pictures.

    Returns:
        The pictures, or None.

    Raises:
        InputError: if they cannot be read, or have other classes than the training pictures.
    """
    if wanted is None:
        splits = [split for split in ("train", *SPLITS) if (Path(data) / split).is_dir()]
        source = read_folder(data) if "train" in splits and len(splits) > 1 else None
    else:
        source = None if wanted == NONE else open_source(wanted)
    if source is not None and set(source.classes) != set(training.classes):
        raise InputError(
            f"the classes of the validation pictures ({_names(source.classes, training.classes)}) "
            f"are not those of training ({_names(training.classes, source.classes)}); "
            "--val none trains without validation"
        )
    return source


def _names(classes: tuple[str, ...], others: tuple[str, ...]) -> str:
    alone = sorted(set(classes) - set(others))
    more = ", ..." if len(alone) > 3 else ""
    return f"{len(classes)}, only here: {', '.join(alone[:3]) or 'none'}{more}"


@dataclass(frozen=True)
class Validation:
    """Scores parameters on the validation pictures.

    Attributes:
        trainer: makes the model.
        source: the pictures.
        classes: names of the classes in the head's order.
    """

    trainer: Trainer
    source: Source
    classes: tuple[str, ...]

    def measure(
        self, parameters: Tree, on_batch: Callable[[int], None] = lambda seen: None
    ) -> tuple[float, float]:
        """Classify every picture once.

        Args:
            parameters: of the model.
            on_batch: called after each batch with the pictures so far; what it raises ends the
                validation.

        Returns:
            The top-1 accuracy in per cent, and the mean loss.

        Raises:
            PictureError: for a picture that cannot be read.
        """
        config, placement = self.trainer.config, self.trainer.placement
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
                placement.shard_batch,
                on_batch=lambda tally: on_batch(tally.totals.images),
            )
        totals = tally.totals
        return 100.0 * totals.correct / totals.images, totals.loss / totals.images

    @functools.cached_property
    def _compiled(self) -> Callable[[Tree, Any, Any], Outputs]:
        def step(
            parameters: Tree, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]
        ) -> Outputs:
            logits, report = self.trainer.model(parameters).classify(normalize(pixels))
            return compare(logits, labels, report)

        return self.trainer.placement.compile(step)


def ends_epoch(step: int, batch_size: int, pictures: int, every: float) -> bool:
    """Tell whether a step is the first to reach a multiple of `every` epochs.

    Args:
        step: steps done.
        batch_size: pictures in a step.
        pictures: training pictures.
        every: epochs between two validations.
    """
    before, now = np.floor(np.array([step - 1, step]) * batch_size / (pictures * every))
    return step > 0 and bool(now > before)
