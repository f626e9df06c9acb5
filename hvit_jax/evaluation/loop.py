"""Running a compiled step over all batches, in one process or in several that divide each batch."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Int

from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.source import Source, Subset
from hvit_jax.distributed.gathering import gather
from hvit_jax.evaluation.step import PADDING, UNREADABLE, Step
from hvit_jax.evaluation.tally import Tally

_IN_FLIGHT = 2


@dataclass(frozen=True)
class BatchSharding:
    """How processes divide pictures: each takes neighbouring rows of every batch.

    The rows of a batch are in the source's order whatever the number of processes, so that results
    are too. All processes run the same number of batches; the last one may have no pictures for
    some of them.

    Attributes:
        pictures: of the source.
        batch_size: rows of a batch, of all processes together; they divide evenly.
        process: which process this is.
        processes: how many there are.
    """

    pictures: int
    batch_size: int
    process: int = field(default_factory=jax.process_index)
    processes: int = field(default_factory=jax.process_count)

    @property
    def rows(self) -> int:
        """Rows of every batch that this process decodes."""
        return self.batch_size // self.processes

    @property
    def batches(self) -> int:
        """Batches that every process runs."""
        return -(-self.pictures // self.batch_size)

    @property
    def indices(self) -> tuple[int, ...]:
        """The pictures that this process decodes, in ascending order."""
        places = np.arange(self.pictures)
        mine = places[places % self.batch_size // self.rows == self.process]
        return tuple(mine.tolist())

    def load(
        self, source: Source, resolution: tuple[int, int], workers: int
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Start to decode this process's rows of every batch; see `load_batches`.

        Args:
            source: the pictures, all of them.
            resolution: height and width of the prepared pictures.
            workers: processes that decode.
        """
        mine = source if self.processes == 1 else Subset(source, self.indices)
        return load_batches(
            mine, resolution, batch_size=self.rows, workers=workers, batches=self.batches
        )

    def gather(self, number: int, batch: Batch, labels: Int[np.ndarray, " B"]) -> Batch:
        """Describe a batch of all processes, which all call this.

        Args:
            number: of the batch.
            batch: this process's rows of it.
            labels: of all rows; UNREADABLE tells pictures that could not be read.

        Returns:
            Indices and problems of all rows; its pixels are left out, as zeros of no size.
        """
        first = number * self.batch_size
        indices = tuple(range(first, min(first + self.batch_size, self.pictures)))
        problems = {}
        if (labels == UNREADABLE).any():
            # JSON's keys are strings; pairs keep the rows.
            for process, pairs in enumerate(gather(list(batch.problems.items()))):
                problems |= {process * self.rows + row: text for row, text in pairs}
        return Batch(np.zeros((self.batch_size, 0, 0, 3), np.uint8), indices, problems)


def score(
    step: Step,
    batches: Iterable[Batch],
    labels: Sequence[int],
    tally: Tally,
    *,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
    sharding: BatchSharding | None = None,
    skip_unreadable: bool = False,
    on_batch: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Run a step over all batches, and add their results to a tally.

    The next batch is handed to the device before the last one's result is read.

    Args:
        step: from `compile_step`.
        batches: from `load_batches` or `BatchSharding.load`, of the step's size.
        labels: the right class of every picture of the source.
        tally: gets every batch; an exception leaves in it what was scored before.
        put: puts pictures and labels where the step takes them.
        sharding: how the processes divide the pictures; default: this one has them all.
        skip_unreadable: leave out pictures that cannot be read, instead of raising.
        on_batch: called after each batch, to show progress.

    Raises:
        PictureError: for a picture that cannot be read.
    """
    running = collections.deque()
    several = sharding if sharding is not None and sharding.processes > 1 else None
    known = np.asarray(labels, np.int32)
    mine = known if several is None else known[list(several.indices)]

    def check(batch: Batch) -> None:
        if batch.problems and not skip_unreadable:
            raise PictureError(batch.problems[min(batch.problems)])

    def finish_oldest() -> None:
        number, batch, outputs, started, waited = running.popleft()
        outputs = jax.device_get(outputs)
        if several is not None:
            batch = several.gather(number, batch, outputs.labels)
            check(batch)
        tally.add(batch, outputs.labels, outputs, started, waited)
        on_batch(tally)

    for number, (batch, waited) in enumerate(_timed(batches)):
        if several is None:
            check(batch)
        started = time.perf_counter()
        outputs = step(put(batch.pixels), put(_labels(batch, mine)))
        running.append((number, batch, outputs, started, waited))
        if len(running) > _IN_FLIGHT:
            finish_oldest()
    while running:
        finish_oldest()


def _labels(batch: Batch, known: Int[np.ndarray, " N"]) -> Int[np.ndarray, " B"]:
    """Give the label of every row; PADDING or UNREADABLE where there is no picture.

    Args:
        batch: some pictures.
        known: the labels of all pictures that this process decodes.
    """
    labels = np.full(len(batch.pixels), PADDING, np.int32)
    labels[: len(batch.indices)] = known[list(batch.indices)]
    labels[list(batch.problems)] = UNREADABLE
    return labels


def _timed(batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Pass batches on, with the seconds waited for each; the first one's start does not count."""
    asked = None
    for batch in batches:
        yield batch, 0.0 if asked is None else time.perf_counter() - asked
        asked = time.perf_counter()
