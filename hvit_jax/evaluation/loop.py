"""Running a compiled step over all batches, in one process or in several that divide each batch."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Int

from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.picture import PictureError
from hvit_jax.data.source import Source, Subset
from hvit_jax.distributed.gathering import gather
from hvit_jax.evaluation.step import PADDING, UNREADABLE, Step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.pictures import Preprocessing

_IN_FLIGHT = 2


@dataclass(frozen=True)
class BatchSharding:
    """How processes divide pictures: each takes neighbouring rows of every batch.

    The rows of a batch are in the source's order whatever the number of processes, so that results
    are too. All processes run the same number of batches; the last one may have no pictures for
    some of them.
    """

    pictures: int  # Of the source.
    batch_size: int  # Rows of all processes together, which divide them evenly.
    process: int = field(default_factory=jax.process_index)
    processes: int = field(default_factory=jax.process_count)
    first: int = 0  # The picture to begin with; those before it are left out.

    @property
    def rows(self) -> int:
        """Rows of every batch that this process decodes."""
        return self.batch_size // self.processes

    @property
    def batches(self) -> int:
        """Batches that every process runs."""
        return -(-(self.pictures - self.first) // self.batch_size)

    @property
    def indices(self) -> tuple[int, ...]:
        """The pictures that this process decodes, in ascending order."""
        places = np.arange(self.pictures - self.first)
        mine = places[places % self.batch_size // self.rows == self.process]
        return tuple((self.first + mine).tolist())

    def load(
        self,
        source: Source,
        resolution: tuple[int, int],
        workers: int,
        preprocessing: Preprocessing = Preprocessing(),
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Start to decode this process's rows of every batch; see `load_batches`."""
        return load_batches(
            Subset(source, self.indices),
            resolution,
            batch_size=self.rows,
            workers=workers,
            batches=self.batches,
            preprocessing=preprocessing,
        )


def score(
    step: Step,
    batches: Iterable[Batch],
    labels: Int[np.ndarray, "N ..."],
    tally: Tally,
    put: Callable[[np.ndarray], jax.Array],
    *,
    skip_unreadable: bool = False,
    on_batch: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Run a step over all batches, and add their results to a tally.

    The next batch is handed to the device before the last one's result is read.

    Args:
        step: from `compile_step`.
        batches: from `BatchSharding.load`.
        labels: the right output of every picture that this process decodes, or several each.
        tally: gets every batch; an exception leaves in it what was scored before.
        put: puts pictures and labels where the step takes them, such as `Placement.shard_batch`.
        skip_unreadable: leave out pictures that cannot be read, instead of raising.
        on_batch: called after each batch, to show progress.

    Raises:
        PictureError: for a picture that cannot be read.
    """
    running = collections.deque()

    def finish_oldest() -> None:
        problems, outputs, started, waited = running.popleft()
        outputs = jax.device_get(outputs)
        if (outputs.labels == UNREADABLE).any():  # In any process, so that all of them gather.
            problems = [each for found in gather(problems) for each in found]
            if not skip_unreadable:
                raise PictureError(problems[0])
        tally.add(outputs, problems, started, waited)
        on_batch(tally)

    for batch, waited in _timed(batches):
        started = time.perf_counter()
        outputs = step(put(batch.pixels), put(labels_of(batch, labels)))
        problems = [batch.problems[row] for row in sorted(batch.problems)]
        running.append((problems, outputs, started, waited))
        if len(running) > _IN_FLIGHT:
            finish_oldest()
    while running:
        finish_oldest()


def labels_of(batch: Batch, known: Int[np.ndarray, "N ..."]) -> Int[np.ndarray, "B ..."]:
    """Give the label of every row; `known` are those of all pictures that this process decodes."""
    labels = np.full((len(batch.pixels), *known.shape[1:]), PADDING, np.int32)
    labels[: len(batch.indices)] = known[list(batch.indices)]
    labels[list(batch.problems)] = UNREADABLE
    return labels


def _timed(batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
    """Pass batches on, with the seconds waited for each; the first one's start does not count."""
    asked = None
    for batch in batches:
        yield batch, 0.0 if asked is None else time.perf_counter() - asked
        asked = time.perf_counter()
