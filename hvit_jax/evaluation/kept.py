"""Scored pictures on disk: what an evaluation that was killed goes on from.

FILE.progress/settings.json    what the evaluation is
FILE.progress/000000512.npz    results of pictures from number 512 on, and the sums up to the last

FILE is that of the results. Each file appears whole or not at all, and none changes afterwards,
except that an interrupted saving is repeated. The folder goes once the results are written.
"""

from __future__ import annotations

import dataclasses
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from hvit_jax.errors import InputError
from hvit_jax.evaluation.files import write_atomically
from hvit_jax.evaluation.tally import Rows, Tally, Totals, join_rows
from hvit_jax.files import new_folder, remove_folder

SECONDS = 30.0  # between two savings
_SETTINGS = "settings.json"
_ARRAYS = ("indices", "labels", "top1", "logits")  # the last only for --predictions


def folder_of(output: Path) -> Path:
    """Name the folder that belongs to a file of results."""
    return output.with_name(f"{output.name}.progress")


def holds_pictures(folder: Path) -> bool:
    """Tell whether anything in a folder would be lost with it."""
    return any(folder.glob("*.npz"))


class Kept:
    """The folder of one evaluation."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """Name the folder; nothing is read or written yet.

        Args:
            folder: from `folder_of`.
            settings: what results depend on; an evaluation that goes on must have the same.
        """
        self._folder, self._settings = folder, json.loads(json.dumps(settings))
        self._batches, self._pictures, self._saved = 0, 0, time.monotonic()

    def begin(self) -> None:
        """Make the folder anew, without pictures.

        Raises:
            InputError: if it cannot be written.
        """
        self.remove()
        with new_folder(self._folder) as folder:
            text = json.dumps(self._settings, indent=1)
            (folder / _SETTINGS).write_text(text + "\n", encoding="utf-8")

    def restore(self, tally: Tally) -> None:
        """Fill an empty tally with what was scored before.

        Args:
            tally: of this evaluation.

        Raises:
            InputError: if the folder is damaged, or of an evaluation with other settings.
        """
        try:
            before = json.loads((self._folder / _SETTINGS).read_text(encoding="utf-8"))
            self._compare(before)
            parts = self._read()
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{self._folder} is damaged ({error}); without --resume, --overwrite begins again"
            ) from error
        if parts:
            tally.restore(parts)
        self._batches, self._pictures = tally.totals.batches, tally.totals.pictures

    def _compare(self, before: dict[str, Any]) -> None:
        for name, now in self._settings.items():
            if before[name] != now:
                raise InputError(
                    f"{self._folder} was begun with another {name}: {before[name]}, now {now}; "
                    "repeat that command, or leave --resume out and begin again with --overwrite"
                )

    def _read(self) -> list[tuple[Rows, Totals, float]]:
        """Read the files in order: each one's rows, and the sums and the wait until then."""
        parts, place = [], 0
        names = {path.name for path in self._folder.glob("*.npz")}
        while (name := _name(place)) in names:
            names.remove(name)
            with np.load(self._folder / name) as file:
                about = json.loads(str(file["about"]))
                indices, labels, top1 = (file[name] for name in _ARRAYS[:3])
                logits = file["logits"] if "logits" in file else None
            totals = Totals(**about["totals"], batches=len(parts) + 1)
            rows = Rows(indices, labels, top1, logits, tuple(about["problems"]))
            parts.append((rows, totals, float(about["waited"])))
            place = totals.pictures
        if names:
            raise ValueError(f"{_name(place)} is missing")
        return parts

    def due(self) -> bool:
        """Tell whether it is time to save again, and count from now on if it is."""
        now = time.monotonic()
        if now - self._saved < SECONDS:
            return False
        self._saved = now
        return True

    def save(self, tally: Tally) -> None:
        """Write what was scored since the last time.

        Raises:
            InputError: if it cannot be written; the next time it is tried again.
        """
        totals, waited = tally.totals, tally.waited
        if totals.pictures == self._pictures:
            return
        rows = join_rows(tally.rows[self._batches : totals.batches])
        arrays = {name: getattr(rows, name) for name in _ARRAYS}
        sums = dataclasses.asdict(totals)
        del sums["batches"], sums["finished"]
        about = json.dumps({"totals": sums, "waited": waited, "problems": rows.problems})
        arrays = {name: array for name, array in arrays.items() if array is not None}
        write_atomically(
            self._folder / _name(self._pictures),
            lambda file: np.savez(file, about=np.array(about), **arrays),
        )
        self._batches, self._pictures = totals.batches, totals.pictures

    def remove(self) -> None:
        """Remove the folder, if it is there.

        Raises:
            InputError: if it cannot be removed.
        """
        remove_folder(self._folder)

    def exists(self) -> bool:
        """Tell whether an earlier run left the folder."""
        return self._folder.is_dir()

    def empty(self) -> bool:
        """Tell whether the folder holds no pictures."""
        return not holds_pictures(self._folder)


def _name(first: int) -> str:
    return f"{first:09d}.npz"
