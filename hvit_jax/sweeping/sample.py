"""A sample of the pictures, decoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hvit_jax.checkpoint import Description
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.subset import Subset
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import head_labels

MOST_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Sample:
    """Prepared pictures.

    Attributes:
        batches: the pictures in batches of equal size, the last one padded.
        labels: the right class of every picture, as the head's outputs are numbered.
    """

    batches: tuple[Batch, ...]
    labels: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """Rows of every batch."""
        return len(self.batches[0].pixels)


def load_sample(
    part: Subset,
    description: Description,
    resolution: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    show: Callable[[Iterable[Batch], int], Iterable[Batch]],
) -> Sample:
    """Decode pictures.

    Args:
        part: the pictures.
        description: of the checkpoint.
        resolution: height and width of the prepared pictures.
        batch_size: rows of a batch.
        workers: processes that decode.
        show: wraps the batches, of which it is told the number, to show progress.

    Raises:
        InputError: if a picture cannot be read, or the sample would take too much memory.
    """
    size, (height, width) = batch_size, resolution
    needed = -(-len(part) // size) * size * height * width * 3
    if needed > MOST_BYTES:
        most = MOST_BYTES // (height * width * 3) // size * size
        raise InputError(
            f"{len(part)} pictures of {height} x {width} take {needed / 1e9:.1f} GB of memory, "
            f"more than {MOST_BYTES / 1e9:g}; use --pictures {most}"
        )
    with load_batches(part, resolution, batch_size=size, workers=workers) as batches:
        kept = tuple(show(batches, -(-len(part) // size)))
    for batch in kept:
        for problem in batch.problems.values():
            raise InputError(problem)
    return Sample(kept, head_labels(part.labels, part.classes, description))
