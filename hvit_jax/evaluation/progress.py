"""How far an evaluation is: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hvit_jax.evaluation.tally import Tally

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def show_progress(
    console: Console, total: int, first: int = 0
) -> Iterator[Callable[[Tally], None]]:
    """Show running accuracy, speed and the time that is left.

    Args:
        console: where to.
        total: pictures to score.
        first: how many an earlier run has scored.

    Yields:
        A function to call after each batch.
    """
    if console.is_terminal:
        with _live_bar(console, total, first) as update:
            yield update
    else:
        yield _lines(console, total, first)


@contextmanager
def _live_bar(console: Console, total: int, first: int) -> Iterator[Callable[[Tally], None]]:
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[scores]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=first, scores="")
        yield lambda tally: progress.update(
            task, completed=tally.totals.pictures, scores=summary(tally)
        )


def _lines(console: Console, total: int, first: int) -> Callable[[Tally], None]:
    start = last = time.monotonic()

    def update(tally: Tally) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES:
            return
        last, seen = now, tally.totals.pictures
        left = (now - start) * (total - seen) / max(1, seen - first)
        console.print(f"{seen}/{total} pictures, {summary(tally)}, {left:.0f} s left")

    return update


def summary(tally: Tally) -> str:
    """Put the running results in a few words."""
    totals = tally.totals
    top1, top5 = totals.percent(totals.correct), totals.percent(totals.correct_top5)
    speed = totals.images_per_second
    if top1 is None or top5 is None or speed is None:
        return "nothing scored yet"
    return f"top-1 {top1:.2f} top-5 {top5:.2f} {speed:.1f} images/s"
