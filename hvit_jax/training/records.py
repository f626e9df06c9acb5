"""A run's numbers over time: rows in two CSV files, and TensorBoard's events."""

from __future__ import annotations

import csv
import dataclasses
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
    """A CSV file that rows are appended to; each is at once visible to readers."""

    def __init__(self, path: Path, kind: type[Row], first_step: int):
        """Open the file, and cut off what a killed run wrote behind the step it resumes from.

        Args:
            path: the file.
            kind: of its rows.
            first_step: the last step whose row remains.

        Raises:
            InputError: if it cannot be written.
        """
        self.path, self.last = path, None
        header = [field.name for field in dataclasses.fields(kind)]
        with writing(path):
            self._file = path.open("a+", newline="")
            size, self.last = _remaining(path.read_bytes(), header, kind, first_step)
            self._file.truncate(size)
            self._writer = csv.writer(self._file)
            if not size:
                self._write(header)

    def append(self, row: Row) -> None:
        """Append a row.

        Raises:
            InputError: if it cannot be written.
        """
        with writing(self.path):
            self._write(dataclasses.astuple(row))
        self.last = row

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, values: Any) -> None:
        self._writer.writerow(values)
        self._file.flush()


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
    """The files that a run's rows go to; process 0 writes them, the others know its last rows.

    Attributes:
        last: the last row of each kind, if there is any.
    """

    def __init__(self, output: Path, first_step: int, *, tensorboard: bool):
        """Open the files in OUTPUT, to go on behind `first_step`.

        Raises:
            InputError: if they cannot be written.
        """
        self._tables, self._events = {}, None
        if jax.process_index() == 0:
            self._tables = {
                kind: Table(output / f"{name}.csv", kind, first_step)
                for kind, (name, _) in _NAMES.items()
            }
            if tensorboard:
                folder = str(output / "tensorboard")
                # TensorBoard drops what a killed run wrote behind the step it resumes from.
                self._events = import_tensorboard().SummaryWriter(folder, purge_step=first_step + 1)
        mine = [table.last and dataclasses.asdict(table.last) for table in self._tables.values()]
        rows = zip(_NAMES, gather(mine)[0], strict=True)
        self.last: dict[type[Row], Any] = {kind: row and kind(**row) for kind, row in rows}

    def write(self, row: Row) -> None:
        """Write a row.

        Raises:
            InputError: if it cannot be written.
        """
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
        """Close all files."""
        for table in self._tables.values():
            table.close()
        if self._events:
            self._events.close()


def import_tensorboard() -> Any:
    """Import what writes TensorBoard's events.

    Raises:
        InputError: if it is missing.
    """
    try:
        import tensorboardX
    except ImportError as error:
        raise InputError(
            "--tensorboard needs tensorboardX: pip install 'hvit-jax[tensorboard]'"
        ) from error
    return tensorboardX
