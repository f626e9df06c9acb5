"""Rows of result files: what they hold, how they are shown, and how they are kept on disk."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hvit_jax.errors import InputError
from hvit_jax.fields import Options, as_json
from hvit_jax.reducers import method_name
from hvit_jax.system.files import check_destination, read_json, write_atomically, write_json
from hvit_jax.system.provenance import changes


@dataclass(frozen=True, kw_only=True)
class Row:
    """A configuration and what came of it; what the rows of all result files have."""

    method: str
    model: str  # The name of its size, or "custom".
    args: dict[str, Any]  # The method's options.
    resolution: list[int]  # Height and width in pixels.
    batch: int  # Images at once.
    dtype: str | None  # What blocks are computed in; None if nothing ran.
    gflops: float  # Billions of multiply-adds of one image, in the tables' convention.
    throughput: float | None = None  # Images per second.
    error: str | None = None  # Why it failed; None if it did not.

    @property
    def name(self) -> str:
        """The method with its main options."""
        return method_name(self.method, self.args)

    @property
    def size(self) -> str:
        """The resolution, one number for a square."""
        return "x".join(map(str, dict.fromkeys(self.resolution)))

    @property
    def configuration(self) -> str:
        """What was computed, whatever the batch and dtype, to compare rows by."""
        return configuration_key(dataclasses.asdict(self))

    @property
    def key(self) -> tuple:
        """What tells one row of a file from another."""
        return self.configuration, self.batch, self.dtype


@dataclass(frozen=True, kw_only=True)
class Measurement(Row):
    """A row of `hvit profile`; figures that were not measured are None."""

    tokens: list[int]  # That leave each block, CLS included.
    table_gflops: float | None = None  # GFLOPs of a window as the Segmenter tables count them.
    published: dict[str, Any] | None = None  # The published results of this configuration.
    parameters: int | None = None  # How many numbers the model has.
    # Billions of operations a batch, as the compiler counts them: a loop's body once, a library's
    # call not at all.
    compiler_gflops: float | None = None
    compile_seconds: float | None = None  # What tracing and compiling took.
    compile_from_cache: bool | None = None  # Whether the program came from the disk instead.
    latency_ms: float | None = None  # Median of a single image, waited for.
    latency_p95_ms: float | None = None  # What 95 % of single images do not exceed.
    throughput_range: list[float] | None = None  # Images a second in the slowest and fastest round.
    peak_memory_bytes: int | None = None  # Device memory that the program needs at its peak.
    tflops_per_second: float | None = None  # Trillions of operations, two for a multiply-add.
    peak_share: float | None = None  # That as a share of the device's fastest matrix product.
    speedup_over_dense: float | None = None  # Images a second over the dense model's in this run.
    speedup_over_rival: float | None = None  # The same over the dense model of --against.
    rival: str | None = None  # Whose that is, and how it ran.
    rival_latency_ms: float | None = None  # The rival's median of a single image.


def configuration_key(about: dict[str, Any]) -> str:
    """Write method, model, options and resolution as one word; see `Row.configuration`.

    Raises:
        KeyError: if one of them is missing.
    """
    names = ("method", "model", "args", "resolution")
    return json.dumps([about[name] for name in names], sort_keys=True)


def _published(name: str) -> Callable[[Measurement], Any]:
    return lambda row: (row.published or {}).get(name)


_COLUMNS: tuple[tuple[str, Callable[[Measurement], Any], str], ...] = (
    ("GFLOPs", lambda row: row.gflops, "{:.3f}"),
    ("Segmenter's GFLOPs", lambda row: row.table_gflops, "{:.3f}"),
    ("published", _published("gflops"), "{:.1f}"),
    ("mIoU published", _published("miou"), "{:.2f}"),
    ("top-1 published", _published("top1"), "{:.1f}"),
    ("images/s", lambda row: row.throughput, "{:.1f}"),
    ("x dense", lambda row: row.speedup_over_dense, "{:.2f}"),
    ("published x dense", _published("speedup"), "{:.2f}"),
    ("x rival", lambda row: row.speedup_over_rival, "{:.2f}"),
    ("latency (ms)", lambda row: row.latency_ms, "{:.2f}"),
    ("p95 (ms)", lambda row: row.latency_p95_ms, "{:.2f}"),
    ("rival (ms)", lambda row: row.rival_latency_ms, "{:.2f}"),
    ("memory (GB)", lambda row: row.peak_memory_bytes and row.peak_memory_bytes / 1e9, "{:.3g}"),
    ("TFLOP/s", lambda row: row.tflops_per_second, "{:.2f}"),
    ("of peak (%)", lambda row: row.peak_share and 100 * row.peak_share, "{:.0f}"),
    ("compile (s)", lambda row: row.compile_seconds, "{:.1f}"),
)


def table(rows: Sequence[Measurement]) -> list[list[str]]:
    """Write rows as cells, below a row of titles; columns without any figure are left out.

    Model, method and batch come first, to name the row.
    """
    shown = [column for column in _COLUMNS if any(column[1](row) is not None for row in rows)]
    lines = [["model", "method", "batch", *(name for name, _, _ in shown)]]
    for row in rows:
        values = ((read(row), form) for _, read, form in shown)
        cells = ["" if value is None else form.format(value) for value, form in values]
        lines.append([f"{row.model} {row.size}", row.name, str(row.batch), *cells])
    return lines


def markdown_table(rows: Sequence[Measurement]) -> str:
    """Write rows as a Markdown table, with what is wrong with those that failed."""
    head, *lines = table(rows)
    if any(row.error for row in rows):
        head.append("error")
        for line, row in zip(lines, rows, strict=True):
            line.append((row.error or "").replace("|", "\\|"))
    ruler = ["---", "---", *("---:" for _ in head[2:])]
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ruler, *lines))


def csv_table(rows: Sequence[Row]) -> str:
    """Write rows, at least one, with all their fields; lists and options are JSON in a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(rows[0]))
    for row in rows:
        cells = dataclasses.asdict(row).values()
        writer.writerow(json.dumps(x) if isinstance(x, dict | list) else x for x in cells)
    return text.getvalue()


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
        tables: dict[str, Callable[[Any], str]] = _TABLES,
    ):
        """Check that the files can be written, and read finished rows where a run continues.

        A run that continues must have the same `about` (device, versions and content), and the same
        `settings`, which names the options that numbers depend on, except for the flags `but`.
        `tables` write rows, by the endings of files other than .json.

        Raises:
            InputError: if a file exists without `resume`, cannot be written, is damaged, or comes
                from another device or other settings.
        """
        self._paths, self._kind, self._about, self._tables = paths, kind, about, tables
        self._config, self._settings, self._but = as_json(config), settings, but
        self.rows: list[Kind] = []
        files = [path for path in paths if path.suffix.lower() == ".json"]
        for path in paths:
            if not resume and path.exists():
                advice = "--resume continues it" if files else "choose another --output"
                raise InputError(f"{path} exists already; {advice}")
            check_destination(path, overwrite=True)
        if resume and not files:
            raise InputError("--resume needs --output FILE.json, whose rows it continues with")
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
            raise InputError(f"{path} is not a report of this command in this release") from error
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
            if path.suffix.lower() == ".json":
                write_json(path, content)
            else:
                text = self._tables[path.suffix.lower()](self.rows)
                write_atomically(path, lambda file, text=text: file.write(text.encode()))
