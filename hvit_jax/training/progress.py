"""How far a run is: bars on a terminal, rows in its files, a line for every validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.parameters import Tree
from hvit_jax.training.records import Records, Unwritten
from hvit_jax.training.trainer import TrainState
from hvit_jax.training.validation import Validation, ends_epoch

_SECONDS_BETWEEN_LINES = 30.0


class Bars:
    """A bar for the steps and, at times, one for the validation; lines where there is no terminal.

    Attributes:
        console: where to.
    """

    def __init__(self, console: Console, progress: Progress, total: int, first: int):
        """Show the bar of the steps."""
        self.console, self._progress, self._total = console, progress, total
        self._steps = progress.add_task("train", total=total, completed=first, text="")
        self._last_line = time.monotonic()

    def step(self, step: int, text: str) -> None:
        """Show a step."""
        self._progress.update(self._steps, completed=step, text=text)
        self._line(f"step {step}/{self._total}, {text}")

    @contextmanager
    def validation(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar for the pictures of a validation; yields a function that moves it."""
        task: TaskID = self._progress.add_task("validate", total=total, text="")

        def update(seen: int) -> None:
            self._progress.update(task, completed=seen)
            self._line(f"validated {seen}/{total}")

        try:
            yield update
        finally:
            self._progress.remove_task(task)

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.console.print(text)


@contextmanager
def show_progress(console: Console, total: int, first: int) -> Iterator[Bars]:
    """Show progress while the context lasts.

    Args:
        console: where to.
        total: steps in all.
        first: steps done before.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    text = TextColumn("{task.fields[text]}")
    live = Progress(
        *columns, text, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with live as progress:
        yield Bars(console, progress, total, first)


@dataclass(frozen=True)
class Reporter:
    """Reports on a run: to its files, and to whoever watches.

    Attributes:
        bars: progress.
        records: the run's files.
        validation: how to validate, or None.
        result: gives the parameters that a state stands for.
        pictures: training pictures.
        batch_size: pictures in a step.
        total_steps: steps in all.
        every: epochs between two validations.
    """

    bars: Bars
    records: Records | Unwritten
    validation: Validation | None
    result: Callable[[TrainState], Tree]
    pictures: int
    batch_size: int
    total_steps: int
    every: float

    def log(self, row: dict[str, Any]) -> None:
        """Report the means of some steps: `step`, `loss`, `accuracy`, `images_per_second`."""
        self.records.write("metrics", {**row, "epoch": self._epoch(row["step"])})
        text = "loss {loss:.3f}  accuracy {accuracy:.3f}  {images_per_second:.0f} images/s"
        self.bars.step(row["step"], text.format(**row))

    def validate(self, state: TrainState, step: int, stopped: Callable[[], bool]) -> None:
        """Validate a state if it ends an epoch or the run, and was not validated before.

        Args:
            state: after some step.
            step: steps done.
            stopped: tells whether to give up.

        Raises:
            KeyboardInterrupt: if given up.
        """
        if self.validation is None or not self._due(step):
            return
        with self.bars.validation(len(self.validation.source)) as update:

            def on_batch(tally: Tally) -> None:
                if stopped():
                    raise KeyboardInterrupt
                update(tally.totals.images)

            scores = self.validation.measure(self.result(state), on_batch)
        row = {"step": step, "epoch": self._epoch(step), **scores}
        self.records.write("validation", row)
        self.bars.console.print("epoch {epoch}: top-1 {top1:.2f} %, loss {loss:.4f}".format(**row))

    def _due(self, step: int) -> bool:
        ends = step == self.total_steps or ends_epoch(
            step, self.batch_size, self.pictures, self.every
        )
        return ends and not self.records.has("validation", step)

    def _epoch(self, step: int) -> float:
        return round(step * self.batch_size / self.pictures, 3)
