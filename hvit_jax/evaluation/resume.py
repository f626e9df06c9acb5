"""Scored pictures on disk: what an evaluation that was stopped or killed goes on from.

FILE.progress/lock             locked while an evaluation runs
FILE.progress/settings.json    what its results depend on
FILE.progress/000000512.npz    results of the pictures from number 512 on, the sums up to the last

FILE is that of the results. Each file of the folder appears whole or not at all, and those of
pictures never change, so that the folder can be resumed at any moment. It goes once the results
are written.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hvit_jax.data.picture import PictureError
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.tally import Rows, Tally, Totals, join_rows
from hvit_jax.system.files import (
    check_destination,
    read_json,
    remove_folder,
    write_atomically,
    write_json,
    writing,
)
from hvit_jax.system.provenance import changes

INTERVAL = 30.0  # Seconds between two savings.
_SETTINGS, _LOCK = "settings.json", "lock"
# What reading a file of pictures raises that is not whole.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile)


class ProgressFolder:
    """The folder of one evaluation, locked within a `with` statement.

    Without --output, and in processes that are not `active`, nothing is checked, read or saved.

    Attributes:
        keep: whether the folder stays, even without pictures: --resume may replace partial results.
    """

    def __init__(
        self, config: EvalConfig, messages: Console, active: bool = True, interval: float = INTERVAL
    ):
        """Name the folder, and the seconds between two savings; nothing is read or written yet."""
        self.keep = True
        self._config, self._messages, self._active = config, messages, active
        self._interval, self._saved_at = interval, time.monotonic()
        self._batches, self._lock = 0, None
        output = config.output if active else None
        self._folder = None if output is None else output.parent / f"{output.name}.progress"

    def __enter__(self) -> ProgressFolder:
        """Lock the folder, after checking that results can be written and that none are lost.

        Raises:
            InputError: if they cannot, another evaluation is at work, or one has left pictures.
        """
        config, folder = self._config, self._folder
        files = [path for path in (config.output, config.predictions) if path and self._active]
        begun = folder is not None and folder.is_dir()
        for path in files:
            check_destination(path, overwrite=config.overwrite or begun)
        if folder is not None:
            self.keep, self._lock = begun, _lock(folder)
            left = begun and (self._saved() or any(path.exists() for path in files))
            if left and not config.resume and not config.overwrite:
                os.close(self._lock)
                raise InputError(
                    f"{folder} holds pictures of an evaluation that did not finish; --resume goes "
                    "on with them, --overwrite begins again"
                )
        return self

    def __exit__(self, *_: object) -> None:
        """Unlock the folder; remove it where it is new and there is nothing to resume."""
        try:
            if not self.keep and not self._saved():
                self.remove()
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def begin(self, settings: dict[str, Any], tally: Tally, count: int) -> None:
        """Put into a tally what an earlier run has scored, if that is wanted, or begin anew.

        Raises:
            InputError: if the folder is damaged, or of an evaluation with other settings.
        """
        folder = self._folder
        if folder is None:
            return
        if self._config.resume and (self._saved() or (folder / _SETTINGS).exists()):
            tally.rows = self._read(folder, settings, logits=tally.keep_logits)
            if tally.skipped and self._config.on_error != "skip":
                raise PictureError(f"{tally.skipped[0]}; --on-error skip goes on without it")
        else:
            for path in reversed(self._saved()):  # So that a kill leaves the first ones.
                path.unlink()
            write_json(folder / _SETTINGS, settings)
        self._batches = len(tally.rows)
        if done := tally.totals.pictures:
            self._messages.print(f"going on: {done} of {count} pictures were scored before")
        elif self._config.resume:
            self._messages.print("nothing to go on with: this is the beginning")

    def _read(self, folder: Path, settings: dict[str, Any], *, logits: bool) -> list[Rows]:
        """Read all files in order, after comparing the settings."""
        rows, first = [], 0
        try:
            before = read_json(folder / _SETTINGS)
            if settings.keys() - before.keys():
                raise ValueError(f"{_SETTINGS} is not complete")
            for path in self._saved():
                if path.name != _name(first):
                    raise ValueError(f"{_name(first)} is missing")
                rows.append(_read_rows(path, logits))
                first = rows[-1].totals.pictures
        except _DAMAGE as error:
            raise InputError(
                f"{folder} is damaged ({error}); without --resume, --overwrite begins again"
            ) from error
        if found := changes(before, json.loads(json.dumps(settings))):
            raise InputError(
                f"{folder} was begun {', '.join(found)}; repeat that command, or leave --resume "
                "out and begin again with --overwrite"
            )
        return rows

    def save_if_due(self, tally: Tally) -> None:
        """Save what was scored since the last time, now and then."""
        if time.monotonic() - self._saved_at >= self._interval:
            self._saved_at = time.monotonic()
            self.save(tally)

    def save(self, tally: Tally) -> None:
        """Save what was scored since the last time; a full disk does not stop the evaluation."""
        new = tally.rows[self._batches :]
        if self._folder is None or not new:
            return
        first = tally.rows[self._batches - 1].totals.pictures if self._batches else 0
        try:
            path = self._folder / _name(first)
            write_atomically(path, lambda file: _write_rows(file, join_rows(new)))
        except InputError as error:
            self._messages.print(f"{error}; a run that is killed loses more")
        else:
            self._batches += len(new)

    def remove(self) -> None:
        """Remove the folder: the results are written. Another evaluation may make it anew."""
        if self._folder is not None:
            remove_folder(self._folder)
            self._folder = None

    def _saved(self) -> list[Path]:
        return sorted(self._folder.glob("*.npz")) if self._folder is not None else []


def _name(first: int) -> str:
    return f"{first:09d}.npz"


def _write_rows(file: Any, rows: Rows) -> None:
    arrays = {name: value for name, value in vars(rows).items() if isinstance(value, np.ndarray)}
    about = {"totals": dataclasses.asdict(rows.totals), "problems": rows.problems}
    np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **arrays)


def _read_rows(path: Path, logits: bool) -> Rows:
    with np.load(path) as file:
        if damaged := file.zip.testzip():  # Not all that NumPy reads is checked.
            raise ValueError(f"{path.name} has another {damaged} than was written")
        about = json.loads(str(file["about"]))
        indices, labels, top1 = (file[name] for name in ("indices", "labels", "top1"))
        found = file["logits"] if logits else None
    return Rows(indices, labels, top1, found, tuple(about["problems"]), Totals(**about["totals"]))


def _lock(folder: Path) -> int:
    """Lock a folder, made where it is missing, until the descriptor returned is closed."""
    path = folder / _LOCK
    with writing(folder):
        folder.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise BlockingIOError  # The other one has ended meanwhile, and removed its folder.
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        output = folder.with_name(folder.name.removesuffix(".progress"))
        raise InputError(
            f"another evaluation writes {output}; wait for it or choose another --output"
        ) from None
    except OSError:  # This file system knows no locks.
        pass
    return descriptor
