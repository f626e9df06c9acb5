"""Which pictures of every batch a process decodes, and the whole batch again from its results."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from hvit_jax.data.loader import Batch
from hvit_jax.data.source import Source
from hvit_jax.data.subset import Subset
from hvit_jax.distributed.together import gather
from hvit_jax.evaluation.step import UNREADABLE


@dataclass(frozen=True)
class Shares:
    """How processes share pictures: each takes rows side by side of every batch.

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
    process: int
    processes: int

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

    def take(self, source: Source) -> Source:
        """Give this process's share of a source."""
        return source if self.processes == 1 else Subset(source, self.indices)

    def whole(self, number: int, batch: Batch, labels: Int[np.ndarray, " B"]) -> Batch:
        """Describe a batch of all processes, which all call this.

        Args:
            number: of the batch.
            batch: this process's share of it.
            labels: of all rows; UNREADABLE tells pictures that could not be read.

        Returns:
            Places and problems of all rows; its pixels are left out, as zeros of no size.
        """
        if self.processes == 1:
            return batch
        first = number * self.batch_size
        indices = tuple(range(first, min(first + self.batch_size, self.pictures)))
        problems = {}
        if (labels == UNREADABLE).any():
            # JSON's keys are strings; pairs keep the rows.
            for process, pairs in enumerate(gather(list(batch.problems.items()))):
                problems |= {process * self.rows + row: text for row, text in pairs}
        return Batch(np.zeros((self.batch_size, 0, 0, 3), np.uint8), indices, problems)


def share_out(pictures: int, batch_size: int) -> Shares:
    """Share pictures among the processes that run."""
    return Shares(pictures, batch_size, jax.process_index(), jax.process_count())
