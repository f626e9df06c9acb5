"""The results on disk: rewritten after every row, and read again to go on."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from hvit_jax.errors import InputError
from hvit_jax.fields import Options, as_json
from hvit_jax.profiling.rows import Row, csv_table, markdown_table
from hvit_jax.system.files import check_destination, read_json, write_atomically, write_json
from hvit_jax.system.provenance import changes

Kind = TypeVar("Kind", bound=Row)
_TABLES: dict[str, Callable[[Any], str]] = {".csv": csv_table, ".md": markdown_table}


class Results(Generic[Kind]):
    """Finished rows, written to files as they come.

    Attributes:
        rows: finished rows; those of an earlier run first.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        kind: type[Kind],
        config: Options,
        about: dict[str, Any],
        *,
        settings: Sequence[str],
        but: Sequence[str] = (),
        resume: bool,
    ):
        """Check that the files can be written, and read finished rows where a run goes on.

        A run that goes on must have the same `about` (device, versions and content), and the same
        `settings`, which names the options that numbers depend on, except for the flags `but`.

        Raises:
            InputError: if a file exists without `resume`, cannot be written, is damaged, or comes
                from another device or other settings.
        """
        self._paths, self._kind, self._about = paths, kind, about
        self._config, self._settings, self._but = as_json(config), settings, but
        self.rows: list[Kind] = []
        files = [path for path in paths if path.suffix == ".json"]
        for path in paths:
            if path.suffix not in (".json", *_TABLES):
                raise InputError(f"--output takes .json, .csv or .md files, got {path}")
            if not resume and path.exists():
                advice = "--resume goes on with it" if files else "choose another --output"
                raise InputError(f"{path} exists already; {advice}")
            check_destination(path, overwrite=True)
        if resume and not files:
            raise InputError("--resume needs --output FILE.json, whose rows it goes on with")
        if resume and files[0].exists():
            self.rows = self._read(files[0])

    def _read(self, path: Path) -> list[Kind]:
        """Read the finished rows of an earlier run; those that failed are tried again."""
        content = read_json(path)
        now = {**self._about, "config": {name: self._config[name] for name in self._settings}}
        try:
            if now.keys() - content.keys() or now["config"].keys() - content["config"].keys():
                raise KeyError("something that decides on the numbers")
            rows = [self._kind(**row) for row in content["rows"] if row["error"] is None]
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is no report of this command, or of another release of it"
            ) from error
        if changed := changes(content, now, but=self._but):
            raise InputError(f"{path} was written {'; '.join(changed)}; choose another --output")
        return rows

    def find(self, row: Row) -> Kind | None:
        """Find the finished row of the same case."""
        return next((each for each in self.rows if each.key == row.key), None)

    def add(self, row: Kind) -> None:
        """Add a row and write the files: .json holds everything, .csv and .md the table."""
        self.rows.append(row)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        rows = [dataclasses.asdict(row) for row in self.rows]
        content = {"date": date, **self._about, "config": self._config, "rows": rows}
        for path in self._paths:
            if path.suffix == ".json":
                write_json(path, content)
            else:
                text = _TABLES[path.suffix](self.rows)
                write_atomically(path, lambda file, text=text: file.write(text.encode()))
