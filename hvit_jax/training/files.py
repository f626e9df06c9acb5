"""What a training run keeps on disk: its newest states, and metrics as CSV."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from hvit_jax.errors import InputError, first_line
from hvit_jax.training.loop import TrainState

METRICS: tuple[str, ...] = ("step", "epoch", "loss", "accuracy", "images_per_second")


class StateFolder:
    """Keeps the newest training states on disk, each complete or absent."""

    def __init__(self, directory: Path):
        """Open or create the folder."""
        self.manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def save(self, state: TrainState) -> None:
        """Write a state, unless its step is there already."""
        step = int(state.step)
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState) -> TrainState | None:
        """Read the newest state, or None where there is none.

        Raises:
            InputError: if it belongs to another model or optimiser.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        try:
            restored: Any = self.manager.restore(step, args=ocp.args.StandardRestore(like))
            return restored
        except (ValueError, KeyError, TypeError) as error:
            reason = first_line(error)[:200]
            raise InputError(
                f"{self.manager.directory} holds the state of another run: {reason}"
            ) from error

    def saved(self) -> bool:
        """Tell whether there is any state, of this run or of the one it goes on with."""
        return bool(self.manager.all_steps())

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


class MetricsFile:
    """Appends rows to `metrics.csv`; rows of steps that a resumed run repeats are dropped."""

    def __init__(self, path: Path, first_step: int):
        """Open the file, keeping the rows up to `first_step`."""
        rows = []
        if path.exists():
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        temporary = path.with_suffix(".tmp")
        self.file = temporary.open("w", newline="")
        self.writer: csv.DictWriter[str] = csv.DictWriter(self.file, METRICS)
        self.writer.writeheader()
        self.writer.writerows(rows)
        self.file.flush()
        os.replace(temporary, path)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, at once visible to readers."""
        self.writer.writerow(row)
        self.file.flush()
