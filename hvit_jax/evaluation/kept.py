"""Scored pictures on disk: what an evaluation that was killed goes on from.

FILE.progress/settings.json    what the evaluation is, and the id of the run; locked while it runs
FILE.progress/000000512.npz    results of pictures from number 512 on, the sums up to the last, the
                               id; behind that, in 4 bytes, the CRC-32 of all before

FILE is that of the results. Each file appears whole or not at all, and none changes afterwards,
except that an interrupted saving is repeated. The folder goes once the results are written.

Two evaluations never share a folder: the lock refuses the second one, and vanishes with a process
that is killed. Where the file system knows no locks, the id shows that the folder, or a file in it,
is another evaluation's.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import time
import uuid
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from hvit_jax.errors import InputError
from hvit_jax.evaluation.lock import SETTINGS, busy, lock
from hvit_jax.evaluation.tally import Rows, Tally, Totals, join_rows
from hvit_jax.system.files import new_folder, remove_folder, write_atomically

SECONDS = 30.0  # between two savings
_ARRAYS = ("indices", "labels", "top1", "logits")  # the last only for --predictions
_CRC_BYTES = 4
# What reading a file raises that this project did not write, or that is not whole.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError)
_DAMAGE += (zipfile.BadZipFile, zlib.error)


def folder_of(output: Path) -> Path:
    """Name the folder that belongs to a file of results."""
    return output.with_name(f"{output.name}.progress")


def refuse_pictures(folder: Path) -> None:
    """Refuse a folder with which scored pictures would be lost.

    Raises:
        InputError: if there are any.
    """
    if _holds_pictures(folder):
        raise InputError(
            f"{folder} holds pictures that were scored already; --resume goes on with them, "
            "--overwrite begins again"
        )


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
        self._run, self._unlock = "", None

    def begin(self, *, overwrite: bool) -> None:
        """Make the folder anew, without pictures, and lock it.

        Args:
            overwrite: whether pictures that an earlier run left may be lost.

        Raises:
            InputError: if it cannot be written, another evaluation does that, or they would be.
        """
        self._hold(self._folder)
        if not overwrite:
            refuse_pictures(self._folder)
        remove_folder(self._folder)
        self._run = uuid.uuid4().hex
        text = json.dumps({"run": self._run, **self._settings}, indent=1)
        try:
            with new_folder(self._folder) as folder:
                (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
                self._hold(folder)
        except InputError as error:
            if self.exists():
                raise busy(self._folder) from error
            raise

    def restore(self, tally: Tally) -> None:
        """Lock the folder, and fill an empty tally with what was scored before.

        Args:
            tally: of this evaluation.

        Raises:
            InputError: if the folder is damaged, of an evaluation with other settings, or another
                process is at it.
        """
        self._hold(self._folder)
        try:
            before = json.loads((self._folder / SETTINGS).read_text(encoding="utf-8"))
            self._compare(before)
            self._run = before["run"]
            parts = self._read()
        except InputError:
            raise
        except _DAMAGE as error:
            raise InputError(
                f"{self._folder} is damaged ({error}); without --resume, --overwrite begins again"
            ) from error
        if parts:
            tally.restore(parts)
        self._batches, self._pictures = tally.totals.batches, tally.totals.pictures

    def _compare(self, before: dict[str, Any]) -> None:
        missing = {"run", *self._settings} - set(before)
        if missing:
            raise ValueError(f"{SETTINGS} does not name {', '.join(sorted(missing))}")
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
            before = parts[-1][1] if parts else Totals()
            parts.append(self._part(name, before))
            place = parts[-1][1].pictures
        if names:
            raise ValueError(f"{_name(place)} is missing")
        return parts

    def _part(self, name: str, before: Totals) -> tuple[Rows, Totals, float]:
        """Read one file: its rows, and the sums and the wait until then."""
        data = (self._folder / name).read_bytes()
        content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
        if _crc(content) != crc:
            raise ValueError(f"{name} has another content than was written")
        with np.load(io.BytesIO(content)) as file:
            about = json.loads(str(file["about"]))
            arrays = {array: file[array] for array in _ARRAYS if array in file}
        if (about["run"], about["first"]) != (self._run, before.pictures):
            raise ValueError(f"{name} is of another evaluation")
        totals, problems = Totals(**about["totals"]), tuple(about["problems"])
        self._check(name, totals.images - before.images, arrays)
        if len(problems) != totals.unreadable - before.unreadable:
            raise ValueError(f"{name} names {len(problems)} unreadable pictures; there are others")
        indices, labels, top1 = (arrays[array] for array in _ARRAYS[:3])
        rows = Rows(indices, labels, top1, arrays.get("logits"), problems)
        return rows, totals, float(about["waited"])

    def _check(self, name: str, count: int, arrays: dict[str, np.ndarray]) -> None:
        """Check that arrays are as long as the sums say, with logits just where they are wanted."""
        wanted = dict.fromkeys(_ARRAYS if self._settings["predictions"] else _ARRAYS[:3], count)
        found = {array: len(values) for array, values in arrays.items()}
        for array in _ARRAYS:
            if found.get(array) != wanted.get(array):
                raise ValueError(
                    f"{name} has {found.get(array, 'no')} {array} for {count} pictures"
                )

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
            InputError: if it cannot be written, then the next time it is tried again; or if another
                evaluation has taken the folder.
        """
        totals, waited = tally.totals, tally.waited
        if totals.pictures == self._pictures:
            return
        if not self._ours():
            raise InputError(f"{self._folder} is not this evaluation's any more; nothing is kept")
        rows = join_rows(tally.rows[self._batches : totals.batches])
        arrays = {name: getattr(rows, name) for name in _ARRAYS}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        sums = dataclasses.asdict(totals)
        del sums["batches"], sums["finished"]
        about = {"run": self._run, "first": self._pictures, "totals": sums, "waited": waited}
        about["problems"] = rows.problems
        buffer = io.BytesIO()
        np.savez(buffer, about=np.array(json.dumps(about)), **arrays)
        buffer.write(_crc(buffer.getbuffer()))
        write_atomically(
            self._folder / _name(self._pictures), lambda file: file.write(buffer.getbuffer())
        )
        self._batches, self._pictures = totals.batches, totals.pictures

    def remove(self) -> None:
        """Remove the folder, unless it is another evaluation's, and unlock it.

        Raises:
            InputError: if it cannot be removed.
        """
        try:
            if self._ours():
                remove_folder(self._folder)
        finally:
            self.release()

    def release(self) -> None:
        """Let other evaluations have the folder; a process that ends does so by itself."""
        if self._unlock is not None:
            self._unlock()

    def _hold(self, folder: Path) -> None:
        descriptor = lock(folder)
        self.release()
        if descriptor is not None:
            self._unlock = weakref.finalize(self, os.close, descriptor)

    def _ours(self) -> bool:
        try:
            return json.loads((self._folder / SETTINGS).read_bytes())["run"] == self._run
        except _DAMAGE:
            return False

    def exists(self) -> bool:
        """Tell whether an earlier run left the folder."""
        return self._folder.is_dir()

    def empty(self) -> bool:
        """Tell whether the folder holds no pictures."""
        return not _holds_pictures(self._folder)


def _holds_pictures(folder: Path) -> bool:
    return any(folder.glob("*.npz"))


def _name(first: int) -> str:
    return f"{first:09d}.npz"


def _crc(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(_CRC_BYTES, "big")
