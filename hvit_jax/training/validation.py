"""Validation on the way: how good the model is on all validation pictures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num, UInt8

from hvit_jax.data.picture import PictureError
from hvit_jax.data.source import Source
from hvit_jax.dense.folders import Scenes
from hvit_jax.dense.metrics import Segmentation
from hvit_jax.dense.picture import finish, window_maps
from hvit_jax.dense.windows import Layout
from hvit_jax.distributed.gathering import gather
from hvit_jax.distributed.placement import place
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import Outputs, compare
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.parameters import Tree
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.records import MapRow, ValidationRow
from hvit_jax.training.trainer import Trainer


@dataclass(frozen=True)
class Validated:
    """What a validation found.

    Attributes:
        kind: the row of validation.csv that it becomes.
        scores: its columns, but step and epoch.
        unreadable: pictures that were left out.
    """

    kind: type[ValidationRow] | type[MapRow]
    scores: dict[str, float]
    unreadable: int


# Takes every validation picture once, by some parameters. The other argument is called with the
# pictures so far; what it raises ends the validation.
Validate = Callable[[Tree, Callable[[int], None]], Validated]


def make_validate(
    trainer: Trainer, source: Source | Scenes, classes: tuple[str, ...], config: TrainConfig
) -> Validate:
    """Make the function that validates.

    Args:
        trainer: makes the model.
        source: the pictures to validate on.
        classes: the model's, in the head's order; those of `source` are the same in any order.
        config: the run's.

    Raises:
        PictureError: when it is called, if no picture can be read, or one that is not skipped.
    """
    if isinstance(source, Scenes):
        return _make_validate_maps(trainer, source, classes, config)
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

    def validate(parameters: Tree, on_batch: Callable[[int], None]) -> Validated:
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
        totals = tally.totals
        _check_any(totals.images)
        top1, loss = 100.0 * totals.correct / totals.images, totals.loss / totals.images
        return Validated(ValidationRow, {"top1": top1, "loss": loss}, totals.unreadable)

    return validate


def _make_validate_maps(
    trainer: Trainer, scenes: Scenes, classes: tuple[str, ...], config: TrainConfig
) -> Validate:
    """Do what `make_validate` does for maps, by the windows that the model will be used with."""
    # Processes have different numbers of windows, so each takes its pictures on its own devices.
    here, metric = place(jax.local_devices()), Segmentation(classes)
    layout = Layout.of(trainer.sizes, trainer.windows)
    processes, first = jax.process_count(), jax.process_index()
    rows = here.round_up(max(1, config.batch_size // config.accumulate // processes))

    def step(parameters: Tree, pixels: Num[Array, "B h w 3"]) -> Float[Array, "B rows columns n"]:
        return window_maps(trainer.model(parameters), pixels, trainer.preprocessing)

    compiled = here.compile(step, arrays=1)

    def maps_of(parameters: Tree, pieces: list[np.ndarray]) -> Float[np.ndarray, "windows h w n"]:
        found = [np.zeros((0, *trainer.sizes.grid, len(classes)), np.float32)]
        for start in range(0, len(pieces), rows):
            batch = np.stack(pieces[start : start + rows]).astype(np.float32)
            filled = np.pad(batch, ((0, rows - len(batch)), *((0, 0),) * 3))
            found.append(np.asarray(compiled(parameters, here.shard_batch(filled)))[: len(batch)])
        return np.concatenate(found)

    def validate(parameters: Tree, on_batch: Callable[[int], None]) -> Validated:
        parameters = here.replicate(trainer.placement.gather(parameters))
        model = trainer.model(parameters)
        total, unreadable = np.zeros((3, len(classes)), np.int64), 0
        for start in range(0, len(scenes), rows * processes):
            mine = range(start + first, min(start + rows * processes, len(scenes)), processes)
            read, problems = _read(scenes, mine, len(classes))
            problems = [problem for found in gather(problems) for problem in found]
            if problems and config.on_error != "skip":
                raise PictureError(problems[0])
            unreadable += len(problems)
            views = [layout.views(pixels, trainer.preprocessing.mean)[0] for pixels, _ in read]
            maps = maps_of(parameters, [piece for view in views for piece in layout.cut(view)])
            for view, (_, truth) in zip(views, read, strict=True):
                own, maps = np.split(maps, [layout.count(view)])
                found = finish(model, layout, [view], own, truth.shape)
                total += metric.measure(found, truth)
            on_batch(min(start + rows * processes, len(scenes)))
        _check_any(len(scenes) - unreadable)
        scores = metric.scores(np.sum(gather(total.tolist()), axis=0), len(scenes))
        scores = {name: scores[name] or 0.0 for name in ("miou", "macc", "aacc")}
        return Validated(MapRow, scores, unreadable)

    return validate


def _read(
    scenes: Scenes, places: Iterable[int], classes: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """Read pictures and their labels; and why some cannot be read."""
    read, problems = [], []
    for index in places:
        try:
            pixels = np.asarray(scenes.open(index))
            truth = scenes.truth(index, pixels.shape[:2], classes)
        except PictureError as error:
            problems.append(str(error))
        else:
            read.append((pixels, truth))
    return read, problems


def _check_any(pictures: int) -> None:
    if not pictures:
        raise PictureError("no validation picture can be read")
