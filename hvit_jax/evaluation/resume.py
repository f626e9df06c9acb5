"""Files of an evaluation: its results, and what it continues from after a stop or a kill.

FILE.progress/lock                   locked while an evaluation runs
FILE.progress/settings.json          what its results depend on
FILE.progress/000000512.npz          results of the pictures from number 512 on, the sums up to the
                                     last
FILE.progress/training-000000512.npz the features of a probe's training pictures likewise

FILE is that of the results. Each file of the folder appears whole or not at all, and those of
pictures never change, so that the folder can be resumed at any moment. The folder is deleted once
the results are written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from hvit_jax.errors import InputError
from hvit_jax.evaluation.results import read_results
from hvit_jax.system.files import (
    check_destination,
    read_json,
    remove_folder,
    write_atomically,
    write_json,
    writing,
)
from hvit_jax.system.provenance import FINGERPRINTS, changes
from hvit_jax.system.signals import uninterrupted

INTERVAL = 30.0  # Seconds between two savings.
_SETTINGS, _LOCK = "settings.json", "lock"
# What names of files of rows begin with: of the pictures, and of a probe's training pictures.
SCORED, TRAINING = "", "training-"
# What scored pictures depend on, so that --resume needs the same; batch and devices may change.
_SAME = ("method", "args", "model", "device", "matmul_precision", "versions", *FINGERPRINTS)
_SAME_OPTIONS = ("resolution", "data", "checkpoint", "compute", "predictions", "preparing")
_SAME_OPTIONS += ("classifying",)
_SAME_OPTIONS += ("truth", "windows", "scales", "flip", "restore", "compare_dense")  # Of maps.
# What reading a file of pictures raises that is not whole.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile)


@runtime_checkable
class Kept(Protocol):
    """What is kept of pictures that are done, such as `evaluation.tally.Tally`.

    Attributes:
        rows: results of neighbouring pictures; each has `totals`, with the number of `pictures` up
            to its last one.
    """

    rows: list[Any]

    @property
    def totals(self) -> Any:
        """The last row's."""
        ...

    def pack(self, rows: Sequence[Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Join rows, and write them as arrays and what JSON can hold."""
        ...

    def unpack(self, arrays: Mapping[str, np.ndarray], about: dict[str, Any]) -> Any:
        """Read the row that `pack` wrote."""
        ...


class ProgressFolder:
    """The folder of one evaluation, locked within a `with` statement.

    Attributes:
        keep: whether the folder stays, even without pictures: --resume may replace partial results.
    """

    def __init__(
        self,
        output: Path | None,
        predictions: Path | None = None,
        *,
        say: Callable[[str], object],
        resume: bool = False,
        overwrite: bool = False,
        interval: float = INTERVAL,
        read: Callable[[Path], dict[str, Any]] = read_results,
    ):
        """Name the folder; nothing is read or written yet.

        Args:
            output: the file of the results; without it nothing is saved.
            predictions: the other file that the evaluation writes.
            say: is told what the user should know.
            resume: continue with what the folder holds.
            overwrite: replace files, and begin anew without `resume`.
            interval: seconds between two savings.
            read: reads whole results.
        """
        self.keep = True
        # The results come last: they are the sign that all is done.
        self._output, self._files = output, [path for path in (predictions, output) if path]
        self._folder = None if output is None else output.parent / f"{output.name}.progress"
        self._say, self._resume, self._overwrite = say, resume, overwrite
        self._interval, self._saved_at, self._read_results = interval, time.monotonic(), read
        self._batches, self._lock, self._finished = {SCORED: 0, TRAINING: 0}, None, None

    def __enter__(self) -> ProgressFolder:
        """Lock the folder, after checking that results can be written and that none are lost.

        Raises:
            InputError: if they cannot, another evaluation is at work, or one has left pictures.
        """
        folder, files = self._folder, self._files
        begun = folder is not None and folder.is_dir()
        if self._resume and not begun and not self._overwrite and self._all_written():
            self._folder = None
            return self
        for path in files:
            check_destination(path, overwrite=self._overwrite or begun)
        if folder is not None:
            self.keep, self._lock = begun, _lock(folder)
            left = begun and (self._saved() or any(path.exists() for path in files))
            if left and not self._resume and not self._overwrite:
                os.close(self._lock)
                raise InputError(
                    f"{folder} holds pictures of an evaluation that did not finish; --resume "
                    "continues with them, --overwrite starts again"
                )
        return self

    def _all_written(self) -> bool:
        """Tell whether all files are there, and read the results, which are written last."""
        if self._output is not None and all(path.is_file() for path in self._files):
            with contextlib.suppress(InputError):
                self._finished = self._read_results(self._output)
        return self._finished is not None

    def __exit__(self, *_: object) -> None:
        """Unlock the folder; remove it where it is new and there is nothing to resume."""
        try:
            if not self.keep and not self._saved():
                self.remove()
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def begin(
        self, about: dict[str, Any], tally: Kept, count: int, training: Kept | None = None
    ) -> dict[str, Any] | None:
        """Put into tallies what an earlier run has done, if that is wanted, or begin anew.

        Args:
            about: what the results say besides the scores.
            tally: gets what was scored.
            count: how many pictures there are.
            training: gets the features of a probe's training pictures.

        Returns:
            The results if an earlier run has written them already, so that nothing to do.

        Raises:
            InputError: if the folder is damaged, or of an evaluation with other settings.
        """
        folder, settings = self._folder, _settings(about)
        if self._finished is not None:
            _refuse_others(self._output, _settings(self._finished), settings)
            self._say(f"{self._output} is complete: nothing to do")
        elif folder is not None:
            if self._resume and (self._saved() or (folder / _SETTINGS).exists()):
                self._check(folder, settings)
                tally.rows = self._read(folder, SCORED, tally)
                if training is not None:
                    training.rows = self._read(folder, TRAINING, training)
            else:
                for path in reversed(self._saved()):  # So that a kill leaves the first ones.
                    path.unlink()
                write_json(folder / _SETTINGS, settings)
            self._batches[SCORED], learnt = len(tally.rows), 0
            if training is not None:
                self._batches[TRAINING], learnt = len(training.rows), training.totals.pictures
            if learnt:
                self._say(f"resumed: {learnt} training pictures were seen before")
            if done := tally.totals.pictures:
                self._say(f"resumed: {done} of {count} pictures were scored before")
            elif self._resume and not learnt:
                self._say("nothing to resume: starting from the beginning")
        return self._finished

    def _check(self, folder: Path, settings: dict[str, Any]) -> None:
        """Compare the settings with those of the folder."""
        try:
            before = read_json(folder / _SETTINGS)
            if settings.keys() - before.keys():
                raise ValueError(f"{_SETTINGS} is not complete")
        except _DAMAGE as error:
            raise _damaged(folder, error) from error
        _refuse_others(folder, before, settings)

    def _read(self, folder: Path, kind: str, kept: Kept) -> list[Any]:
        """Read all files of a kind, in order."""
        rows, first = [], 0
        try:
            for path in self._saved(kind):
                if path.name != _name(kind, first):
                    raise ValueError(f"{_name(kind, first)} is missing")
                rows.append(_read_rows(path, kept))
                first = rows[-1].totals.pictures
        except _DAMAGE as error:
            raise _damaged(folder, error) from error
        return rows

    def save_if_due(self, tally: Kept, kind: str = SCORED) -> None:
        """Save what was done since the last time, now and then."""
        if time.monotonic() - self._saved_at >= self._interval:
            self._saved_at = time.monotonic()
            self.save(tally, kind)

    def save(self, tally: Kept, kind: str = SCORED) -> None:
        """Save what was done since the last time; a full disk does not stop the evaluation."""
        before = self._batches[kind]
        new = tally.rows[before:]
        if self._folder is None or not new:
            return
        first = tally.rows[before - 1].totals.pictures if before else 0
        try:
            path, (arrays, about) = self._folder / _name(kind, first), tally.pack(new)
            arrays["about"] = np.array(json.dumps(about))
            write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
        except InputError as error:
            self._say(f"{error}; if this run is killed, more has to be scored again")
        else:
            self._batches[kind] += len(new)

    def conclude(
        self,
        results: dict[str, Any],
        tally: Kept,
        count: int,
        *,
        done: str,
        show: Callable[[Console, dict[str, Any]], None],
        console: Console,
        on_stage: Callable[[str], None],
        write_predictions: Callable[[Path], object] | None = None,
    ) -> None:
        """Write what is asked for, and print the results.

        Args:
            results: what `output` gets.
            tally: what is saved for --resume if pictures are left, or a file cannot be written.
            count: how many pictures there are.
            done: what was done with those that are not left, such as "scored".
            show: prints the results.
            console: where to.
            on_stage: is told when files are "written".
            write_predictions: writes `predictions`.

        Raises:
            InputError: if something cannot be written, or there is nothing to write.
        """
        with uninterrupted():  # A signal that comes now finds all written and printed.
            written, problems = self._write(results, write_predictions)
            on_stage("written")
            if results["partial"] or problems:
                self.save(tally)
            else:
                self.remove()
            # Only now: where printing fails, for want of a reader or of space, all is done.
            show(console, results)
            if results["partial"]:
                more = "; --resume continues" if results["config"]["output"] else ""
                console.print(
                    f"interrupted: {results['images']} of {count} pictures were {done}{more}"
                )
            for path in written:
                console.print(f"written: {path}", soft_wrap=True)
        if problems:
            raise InputError("; ".join(problems))
        if not results["partial"] and not results["images"]:
            raise InputError(f"none of the {count} pictures could be read")

    def _write(
        self, results: dict[str, Any], write_predictions: Callable[[Path], object] | None = None
    ) -> tuple[list[Path], list[str]]:
        """Write all files: those that were written, and what is wrong with others."""
        written, problems = [], []
        for path in self._files:
            try:
                if path == self._output or write_predictions is None:
                    write_json(path, results)
                else:
                    write_predictions(path)
                written.append(path)
            except InputError as error:
                problems.append(str(error))
        self.keep |= bool(written)
        return written, problems

    def remove(self) -> None:
        """Remove the folder: the results are written. Another evaluation may make it anew."""
        if self._folder is not None:
            remove_folder(self._folder)
            self._folder = None

    def _saved(self, kind: str = "*") -> list[Path]:
        """List the files of a kind, in order; by default of both."""
        found = self._folder.glob(f"{kind}[0-9]*.npz") if self._folder is not None else ()
        return sorted(found)


def _settings(about: dict[str, Any]) -> dict[str, Any]:
    """List what scored pictures depend on; DATA and --checkpoint say where it lies."""
    options = {**about["config"], **about}
    settings = {name: about.get(name) for name in _SAME}
    settings["options"] = {name: options.get(name) for name in _SAME_OPTIONS}
    return json.loads(json.dumps(settings))


def _refuse_others(what: Path | None, before: dict[str, Any], now: dict[str, Any]) -> None:
    if found := changes(before, now):
        raise InputError(
            f"{what} was begun {', '.join(found)}; repeat that command, or leave --resume out and "
            "start again with --overwrite"
        )


def _damaged(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder} is damaged ({error}); without --resume, --overwrite starts again")


def _name(kind: str, first: int) -> str:
    return f"{kind}{first:09d}.npz"


def _read_rows(path: Path, kept: Kept) -> Any:
    with np.load(path) as file:
        if damaged := file.zip.testzip():  # Not all that NumPy reads is checked.
            raise ValueError(f"{path.name} has another {damaged} than was written")
        return kept.unpack(file, json.loads(str(file["about"])))


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
            f"another evaluation is writing {output}; wait for it or choose another --output"
        ) from None
    except OSError:  # This file system knows no locks.
        pass
    return descriptor
