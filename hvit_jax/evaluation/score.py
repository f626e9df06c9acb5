"""Running a compiled step over all batches."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch
from hvit_jax.evaluation.shares import Shares
from hvit_jax.evaluation.step import PADDING, UNREADABLE, Step
from hvit_jax.evaluation.tally import Tally

_IN_FLIGHT = 2


def score(
    step: Step,
    batches: Iterable[Batch],
    labels: Sequence[int],
    tally: Tally,
    *,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
    shares: Shares | None = None,
    skip_unreadable: bool = False,
    on_batch: Callable[[Tally], None] = lambda tally: None,
) -> None:
    """Run a step over all batches, and add their results to a tally.

    The next batch is handed to the device before the last one's result is read.

    Args:
        step: from `compile_step`.
        batches: from `load_batches`, of the step's size.
        labels: the right class of every picture of the source.
        tally: gets every batch; an exception leaves in it what was scored before.
        put: puts pictures and labels where the step takes them.
        shares: how several processes share the pictures, if they do; `batches` and `labels` are
            this process's.
        skip_unreadable: leave out pictures that cannot be read, instead of raising.
        on_batch: called after each batch, to show progress.

    Raises:
        PictureError: for a picture that cannot be read.
    """
    running = collections.deque()
    known = np.asarray(labels, np.int32)

    def finish_oldest() -> None:
        number, batch, outputs, started = running.popleft()
        outputs = jax.device_get(outputs)
        if shares is not None:
            batch = shares.whole(number, batch, outputs.labels)
            check(batch)
        tally.add(batch, outputs.labels, outputs, started)
        on_batch(tally)

    def check(batch: Batch) -> None:
        if not skip_unreadable:
            _check_readable(batch)

    for number, batch in enumerate(_timed(batches, tally)):
        if shares is None:
            check(batch)
        started = time.perf_counter()
        outputs = step(put(batch.pixels), put(_labels(batch, known)))
        running.append((number, batch, outputs, started))
        if len(running) > _IN_FLIGHT:
            finish_oldest()
    while running:
        finish_oldest()


def _labels(batch: Batch, known: Int[np.ndarray, " N"]) -> Int[np.ndarray, " B"]:
    """Give the label of every row; PADDING or UNREADABLE where there is no picture.

    Args:
        batch: some pictures.
        known: the labels of all pictures of the source.
    """
    labels = np.full(len(batch.pixels), PADDING, np.int32)
    labels[: len(batch.indices)] = known[list(batch.indices)]
    labels[list(batch.problems)] = UNREADABLE
    return labels


def _check_readable(batch: Batch) -> None:
    """Refuse a batch with a picture that cannot be read.

    Raises:
        PictureError: if there is one.
    """
    if batch.problems:
        raise PictureError(batch.problems[min(batch.problems)])


def _timed(batches: Iterable[Batch], tally: Tally) -> Iterator[Batch]:
    """Pass batches on, adding up the wait for all but the first."""
    waiting = iter(batches)
    for first in waiting:
        yield first
        break
    while True:
        asked = time.perf_counter()
        batch = next(waiting, None)
        tally.waited += time.perf_counter() - asked
        if batch is None:
            return
        yield batch
