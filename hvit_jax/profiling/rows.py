"""Rows of result files, and rows as tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hvit_jax.reducers import method_name


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
    """A row of `hvit profile`; figures that were not measured are None.

    Attributes:
        tokens: tokens that leave each block, CLS included.
        published: the published results of this configuration.
        parameters: how many numbers the model has.
        compiler_gflops: billions of operations a batch by the compiler's own count, in which a
            loop's body counts once and a library's call not at all.
        compile_seconds: what tracing and compiling took.
        compile_from_cache: whether the compiled program came from the disk instead.
        latency_ms: median of a single image, waited for.
        latency_p95_ms: what 95 % of single images do not exceed.
        throughput_range: the slowest and the fastest round's images per second.
        peak_memory_bytes: device memory that the program needs at its peak.
        tflops_per_second: trillions of operations a second, two for a multiply-add.
        peak_share: the same as a share of the device's fastest matrix product.
        speedup_over_dense: images per second over those of the dense model in the same run.
        speedup_over_torch: the same over PyTorch's dense model.
        torch: how PyTorch ran that.
        torch_latency_ms: PyTorch's median of a single image.
    """

    tokens: list[int]
    published: dict[str, Any] | None = None
    parameters: int | None = None
    compiler_gflops: float | None = None
    compile_seconds: float | None = None
    compile_from_cache: bool | None = None
    latency_ms: float | None = None
    latency_p95_ms: float | None = None
    throughput_range: list[float] | None = None
    peak_memory_bytes: int | None = None
    tflops_per_second: float | None = None
    peak_share: float | None = None
    speedup_over_dense: float | None = None
    speedup_over_torch: float | None = None
    torch: str | None = None
    torch_latency_ms: float | None = None


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
    ("published", _published("gflops"), "{:.1f}"),
    ("top-1 published", _published("top1"), "{:.1f}"),
    ("images/s", lambda row: row.throughput, "{:.1f}"),
    ("x dense", lambda row: row.speedup_over_dense, "{:.2f}"),
    ("published x dense", _published("speedup"), "{:.2f}"),
    ("x PyTorch", lambda row: row.speedup_over_torch, "{:.2f}"),
    ("latency (ms)", lambda row: row.latency_ms, "{:.2f}"),
    ("p95 (ms)", lambda row: row.latency_p95_ms, "{:.2f}"),
    ("PyTorch (ms)", lambda row: row.torch_latency_ms, "{:.2f}"),
    ("memory (GB)", lambda row: row.peak_memory_bytes and row.peak_memory_bytes / 1e9, "{:.3g}"),
    ("TFLOP/s", lambda row: row.tflops_per_second, "{:.2f}"),
    ("of peak (%)", lambda row: row.peak_share and 100 * row.peak_share, "{:.0f}"),
    ("compile (s)", lambda row: row.compile_seconds, "{:.1f}"),
    ("error", lambda row: row.error and row.error.replace("|", "\\|"), "{}"),
)


def markdown_table(rows: Sequence[Measurement]) -> str:
    """Write rows as a Markdown table; columns without any figure are left out."""
    shown = [column for column in _COLUMNS if any(column[1](row) is not None for row in rows)]
    lines = [
        ["model", "method", "batch", *(name for name, _, _ in shown)],
        ["---", "---", "---:", *("---:" for _ in shown)],
    ]
    for row in rows:
        values = ((read(row), form) for _, read, form in shown)
        cells = ["" if value is None else form.format(value) for value, form in values]
        lines.append([f"{row.model} {row.size}", row.name, str(row.batch), *cells])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def csv_table(rows: Sequence[Row]) -> str:
    """Write rows, at least one, with all their fields; lists and options are JSON in a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(rows[0]))
    for row in rows:
        cells = dataclasses.asdict(row).values()
        writer.writerow(
            json.dumps(cell) if isinstance(cell, dict | list) else cell for cell in cells
        )
    return text.getvalue()
