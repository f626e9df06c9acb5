"""A run's numbers over time: rows in two CSV files, and TensorBoard's events."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hvit_jax.distributed.gathering import gather
from hvit_jax.errors import import_optional
from hvit_jax.system.files import writing


@dataclass(frozen=True)
class MetricsRow:
    """A row of metrics.csv: means over the steps since the row before."""

    step: int
    epoch: float
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class ValidationRow:
    """A row of validation.csv, over all validation pictures; `top1` is in per cent."""

    step: int
    epoch: float
    top1: float
    loss: float

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2f} %, loss {self.loss:.4f}"


@dataclass(frozen=True)
class MapRow:
    """The same for maps: mean IoU, and the shares of right pixels, in per cent."""

    step: int
    epoch: float
    miou: float
    macc: float
    aacc: float

    def __str__(self) -> str:
        return f"mIoU {self.miou:.2f} %, mAcc {self.macc:.2f} %, aAcc {self.aacc:.2f} %"


Row = MetricsRow | ValidationRow | MapRow
# Name of the file, and what TensorBoard files its columns under.
METRICS, VALIDATION = "metrics", "validation"
_TAGS = {METRICS: "train", VALIDATION: "val"}


def open_table(path: Path, kind: type[Row], first_step: int) -> Row | None:
    """Make a CSV file, or cut off what a killed run wrote behind the step it resumes from.

    Returns the last row that remains.
    """
    header = [field.name for field in dataclasses.fields(kind)]
    with writing(path):
        path.touch()
        size, last = _remaining(path.read_bytes(), header, kind, first_step)
        os.truncate(path, size)
    if not size:
        append_row(path, header)
    return last


def append_row(path: Path, values: Iterable[Any]) -> None:
    """Append a row to a CSV file, where readers see it at once."""
    with writing(path), path.open("a", newline="") as file:
        csv.writer(file).writerow(values)


def _remaining(
    content: bytes, header: list[str], kind: type[Row], first_step: int
) -> tuple[int, Row | None]:
    """Find how many bytes hold the header and whole rows up to a step, and the last row."""
    size, last = 0, None
    for line in content.splitlines(keepends=True):
        values = line.decode(errors="replace").strip().split(",")
        try:
            row = kind(int(values[0]), *map(float, values[1:])) if size else None
        except (ValueError, TypeError):
            break
        right = values == header if row is None else row.step <= first_step
        if not right or not line.endswith(b"\n"):
            break
        size, last = size + len(line), row
    return size, last


class Records:
    """The files that a run's rows go to; process 0 writes them, the others know its last rows."""

    def __init__(
        self, output: Path, first_step: int, validation: type[Row], *, tensorboard: bool = False
    ):
        """Open the files in OUTPUT, to continue behind `first_step`.

        Args:
            output: the run's folder.
            first_step: the last one that may have rows.
            validation: what the rows of validation.csv are.
            tensorboard: whether TensorBoard's files are written too.
        """
        self._folder, self._events, last = None, None, []
        kinds = {METRICS: MetricsRow, VALIDATION: validation}
        if jax.process_index() == 0:
            self._folder = output
            last = [open_table(output / f"{name}.csv", kinds[name], first_step) for name in kinds]
            if tensorboard:
                folder = str(output / "tensorboard")
                # TensorBoard drops what a killed run wrote behind the step it resumes from.
                self._events = import_tensorboard().SummaryWriter(folder, purge_step=first_step + 1)
        found = gather([row and dataclasses.asdict(row) for row in last])[0]
        rows = zip(kinds, found, strict=True)
        self.last: dict[str, Any] = {name: row and kinds[name](**row) for name, row in rows}

    def write(self, row: Row) -> None:
        """Write a row."""
        name = METRICS if isinstance(row, MetricsRow) else VALIDATION
        self.last[name] = row
        if self._folder:
            append_row(self._folder / f"{name}.csv", dataclasses.astuple(row))
        if self._events:
            values = dataclasses.asdict(row)
            for column in values.keys() - {"step", "epoch"}:
                self._events.add_scalar(f"{_TAGS[name]}/{column}", values[column], row.step)
            self._events.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._events:
            self._events.close()


def import_tensorboard() -> Any:
    """Import what writes TensorBoard's events; an InputError says how to install it."""
    advice = "--tensorboard needs tensorboardX: pip install 'hvit-jax[tensorboard]'"
    return import_optional("tensorboardX", advice)
