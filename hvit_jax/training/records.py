"""A run's numbers over time: rows in two CSV files, and TensorBoard's events."""

from __future__ import annotations

import csv
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hvit_jax.distributed.gathering import gather
from hvit_jax.errors import InputError
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


Row = MetricsRow | ValidationRow
# Name of the file, and what TensorBoard files its columns under.
_NAMES = {MetricsRow: ("metrics", "train"), ValidationRow: ("validation", "val")}


class Table:
    """A CSV file that rows are appended to; each is at once visible to readers.

    What a killed run wrote behind `first_step`, from which it is resumed, is cut off.
    """

    def __init__(self, path: Path, kind: type[Row], first_step: int):
        self._path = path
        header = [field.name for field in dataclasses.fields(kind)]
        with writing(path):
            path.touch()
            size, self.last = _remaining(path.read_bytes(), header, kind, first_step)
            os.truncate(path, size)
        if not size:
            self._write(header)

    def append(self, row: Row) -> None:
        """Append a row."""
        self._write(dataclasses.astuple(row))
        self.last = row

    def _write(self, values: Any) -> None:
        with writing(self._path), self._path.open("a", newline="") as file:
            csv.writer(file).writerow(values)


def _remaining(
    content: bytes, header: list[str], kind: type[Row], first_step: int
) -> tuple[int, Row | None]:
    """Find how many bytes hold the header and whole rows up to a step, and the last row."""
    size, last = 0, None
    for line in content.splitlines(keepends=True):
        values = line.decode(errors="replace").strip().split(",")
        row = _row(values, kind)
        right = values == header if size == 0 else row is not None and row.step <= first_step
        if not right or not line.endswith(b"\n"):
            break
        size, last = size + len(line), row
    return size, last


def _row(values: list[str], kind: type[Row]) -> Row | None:
    try:
        return kind(int(values[0]), *map(float, values[1:]))
    except (ValueError, TypeError):
        return None


class Records:
    """The files that a run's rows go to; process 0 writes them, the others know its last rows."""

    def __init__(self, output: Path, first_step: int, *, tensorboard: bool):
        """Open the files in OUTPUT, to go on behind `first_step`."""
        self._tables, self._events = {}, None
        if jax.process_index() == 0:
            for kind, (name, _) in _NAMES.items():
                self._tables[kind] = Table(output / f"{name}.csv", kind, first_step)
            if tensorboard:
                folder = str(output / "tensorboard")
                # TensorBoard drops what a killed run wrote behind the step it resumes from.
                self._events = import_tensorboard().SummaryWriter(folder, purge_step=first_step + 1)
        mine = [table.last and dataclasses.asdict(table.last) for table in self._tables.values()]
        rows = zip(_NAMES, gather(mine)[0], strict=True)
        self.last: dict[type[Row], Any] = {kind: row and kind(**row) for kind, row in rows}

    def write(self, row: Row) -> None:
        """Write a row."""
        self.last[type(row)] = row
        if self._tables:
            self._tables[type(row)].append(row)
        if self._events:
            values = dataclasses.asdict(row)
            for column in values.keys() - {"step", "epoch"}:
                tag = f"{_NAMES[type(row)][1]}/{column}"
                self._events.add_scalar(tag, values[column], row.step)
            self._events.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._events:
            self._events.close()


def import_tensorboard() -> Any:
    """Import what writes TensorBoard's events; an InputError says how to install it."""
    advice = "--tensorboard needs tensorboardX: pip install 'hvit-jax[tensorboard]'"
    try:
        import tensorboardX
    except ImportError as error:
        raise InputError(advice) from error
    return tensorboardX
