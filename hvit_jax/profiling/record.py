"""The report on disk: rewritten after every row, and read again to go on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.profiling.report import csv_table, markdown_table
from hvit_jax.system.files import check_destination, write_atomically
from hvit_jax.system.provenance import changes

_WRITERS = {".json": None, ".csv": csv_table, ".md": markdown_table}
_CASE = ("method", "model", "args", "resolution", "batch", "dtype")


class Record:
    """Finished rows, written to files as they come.

    Attributes:
        rows: finished rows; those of an earlier run first.
    """

    def __init__(
        self,
        paths: list[Path],
        about: dict[str, Any],
        *,
        resume: bool,
        names: Sequence[str] = _CASE,
    ):
        """Check that the files can be written, and read finished rows where a run goes on.

        Args:
            paths: files to write: .json holds everything, .csv and .md the table.
            about: device, versions, content and settings; a run that goes on must have the same.
            resume: go on with the rows of the .json file, and replace the files.
            names: the fields that tell one row's case from another's.

        Raises:
            InputError: if a file exists without `resume`, cannot be written, is damaged, or comes
                from another device or other settings.
        """
        for path in paths:
            if path.suffix not in _WRITERS:
                raise InputError(f"--output takes .json, .csv or .md files, got {path}")
            if not resume and path.exists():
                raise InputError(f"{path} exists already; --resume goes on with it")
            check_destination(path, overwrite=True)
        self._paths, self._about, self._names = paths, about, names
        self.rows: list[dict[str, Any]] = []
        if resume:
            self.rows = self._finished([path for path in paths if path.suffix == ".json"])

    def _finished(self, files: list[Path]) -> list[dict[str, Any]]:
        if not files:
            raise InputError("--resume needs --output FILE.json, whose rows it goes on with")
        if not files[0].exists():
            return []
        now = json.loads(json.dumps(self._about))
        try:
            content = json.loads(files[0].read_text(encoding="utf-8"))
            finished = [row for row in content["rows"] if row["error"] is None]
            for row in finished:
                self._key(row)
            before = {name: content[name] for name in now}
            if before["settings"].keys() != now["settings"].keys():
                raise KeyError("settings")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{files[0]} is no report of this command, or of another release of it"
            ) from error
        changed = changes(before, now)
        if changed:
            raise InputError(
                f"{files[0]} was written {'; '.join(changed)}; choose another --output"
            )
        return finished

    def find(self, case: dict[str, Any]) -> dict[str, Any] | None:
        """Find the finished row of a case, given as a row too."""
        return next((row for row in self.rows if self._key(row) == self._key(case)), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the files.

        Raises:
            InputError: if they cannot be written.
        """
        self.rows.append(row)
        for path in self._paths:
            writer = _WRITERS[path.suffix]
            text = writer(self.rows) if writer else self._json()
            write_atomically(path, lambda file, text=text: file.write(text.encode()))

    def _json(self) -> str:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {"date": date, **self._about, "rows": self.rows}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row[name] for name in self._names], sort_keys=True)
