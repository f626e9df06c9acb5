"""Running a compiled step over all batches."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch
from hvit_jax.evaluation.step import Step
from hvit_jax.evaluation.tally import Tally

_IN_FLIGHT = 2


def score(
    step: Step,
    batches: Iterable[Batch],
    labels: Sequence[int],
    tally: Tally,
    *,
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
        skip_unreadable: leave out pictures that cannot be read, instead of raising.
        on_batch: called after each batch, to show progress.

    Raises:
        PictureError: for a picture that cannot be read.
    """
    running = collections.deque()
    known = np.asarray(labels, np.int32)

    def finish_oldest() -> None:
        batch, wanted, outputs, started = running.popleft()
        tally.add(batch, wanted, jax.device_get(outputs), started)
        on_batch(tally)

    for batch in batches:
        if batch.problems and not skip_unreadable:
            first = batch.problems[min(batch.problems)]
            raise PictureError(f"{first}; --on-error skip leaves such pictures out")
        wanted = np.zeros(len(batch.pixels), np.int32)
        wanted[: len(batch.indices)] = known[list(batch.indices)]
        started = time.perf_counter()
        outputs = step(jax.device_put(batch.pixels), jax.device_put(wanted))
        running.append((batch, wanted, outputs, started))
        if len(running) > _IN_FLIGHT:
            finish_oldest()
    while running:
        finish_oldest()
