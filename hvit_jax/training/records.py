"""A run's numbers over time: two CSV files, and TensorBoard's events if they are wanted."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from hvit_jax.distributed.together import gather
from hvit_jax.errors import InputError
from hvit_jax.system.files import writing

METRICS = ("step", "epoch", "loss", "accuracy", "images_per_second")
VALIDATION = ("step", "epoch", "top1", "loss")


class CsvFile:
    """Appends rows to a CSV file; rows of steps that a resumed run repeats are dropped."""

    def __init__(self, path: Path, columns: tuple[str, ...], first_step: int):
        """Open the file, keeping the rows up to `first_step`.

        Raises:
            InputError: if it cannot be written.
        """
        rows, self.path = [], path
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if _step(row) <= first_step]
        self.steps = {_step(row) for row in rows}
        temporary = path.with_suffix(".tmp")
        with writing(path):
            self.file = temporary.open("w", newline="")
            self.writer: csv.DictWriter[str] = csv.DictWriter(self.file, columns)
            self.writer.writeheader()
            self.writer.writerows(rows)
            self.file.flush()
            os.replace(temporary, path)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, at once visible to readers.

        Raises:
            InputError: if it cannot be written.
        """
        with writing(self.path):
            self.writer.writerow(row)
            self.file.flush()
        self.steps.add(row["step"])


class Records:
    """Where the rows of a run go."""

    def __init__(self, output: Path, first_step: int, *, tensorboard: bool):
        """Open the files in OUTPUT, to go on behind `first_step`.

        Raises:
            InputError: if TensorBoard's events are wanted and tensorboardX is missing.
        """
        self.files = {
            "metrics": CsvFile(output / "metrics.csv", METRICS, first_step),
            "validation": CsvFile(output / "validation.csv", VALIDATION, first_step),
        }
        self.events = None
        if tensorboard:
            folder = str(output / "tensorboard")
            # TensorBoard drops what a killed run wrote behind the step that is gone on from.
            self.events = _tensorboard().SummaryWriter(folder, purge_step=first_step + 1)

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Write a row of "metrics" or "validation"; TensorBoard files these as train/ and val/."""
        self.files[name].write(row)
        if self.events:
            group = {"metrics": "train", "validation": "val"}[name]
            for column in row.keys() - {"step", "epoch"}:
                self.events.add_scalar(f"{group}/{column}", row[column], row["step"])
            self.events.flush()

    def has(self, name: str, step: int) -> bool:
        """Tell whether a file has a row of this step."""
        return step in self.files[name].steps

    def close(self) -> None:
        """Close all files."""
        for each in self.files.values():
            each.file.close()
        if self.events:
            self.events.close()


class Unwritten:
    """Stands for `Records` in a process that leaves the writing to process 0."""

    def __init__(self, validated: Iterable[int]):
        """Note the steps that have been validated."""
        self.validated = set(validated)

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Note a step that has been validated."""
        if name == "validation":
            self.validated.add(row["step"])

    def has(self, name: str, step: int) -> bool:
        """Tell whether process 0 has a row of this step in "validation"."""
        return name == "validation" and step in self.validated

    def close(self) -> None:
        """Do nothing."""


def open_records(output: Path, first_step: int, *, tensorboard: bool) -> Records | Unwritten:
    """Open a run's records in process 0, and stand-ins that know the same in the others.

    Raises:
        InputError: if TensorBoard's events are wanted and tensorboardX is missing.
    """
    if jax.process_index() == 0:
        records = Records(output, first_step, tensorboard=tensorboard)
        gather(sorted(records.files["validation"].steps))
        return records
    return Unwritten(gather(None)[0])


def check_tensorboard() -> None:
    """Check that TensorBoard's events can be written, before anything is computed.

    Raises:
        InputError: if tensorboardX is missing.
    """
    _tensorboard()


def _step(row: dict[str, Any]) -> int:
    """Read a row's step; a row that was cut off counts as later than any."""
    whole = None not in row.values() and row["step"].isdecimal()
    return int(row["step"]) if whole else sys.maxsize


def _tensorboard() -> Any:
    try:
        import tensorboardX
    except ImportError as error:
        raise InputError(
            "--tensorboard needs tensorboardX: pip install 'hvit-jax[tensorboard]'"
        ) from error
    return tensorboardX
