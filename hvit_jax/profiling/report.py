"""A report's rows as tables."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from hvit_jax.reducers import REDUCERS

Row = dict[str, Any]


def _published(name: str) -> Callable[[Row], Any]:
    return lambda row: (row["published"] or {}).get(name)


def _memory(row: Row) -> float | None:
    bytes = row["peak_memory_bytes"]
    return bytes and bytes / 1e9


def _share(row: Row) -> float | None:
    return row["peak_share"] and 100 * row["peak_share"]


_COLUMNS: tuple[tuple[str, Callable[[Row], Any], str], ...] = (
    ("GFLOPs", lambda row: row["gflops"], "{:.3f}"),
    ("published", _published("gflops"), "{:.1f}"),
    ("top-1 published", _published("top1"), "{:.1f}"),
    ("images/s", lambda row: row["throughput"], "{:.1f}"),
    ("x dense", lambda row: row["speedup_over_dense"], "{:.2f}"),
    ("published x dense", _published("speedup"), "{:.2f}"),
    ("x PyTorch", lambda row: row["speedup_over_torch"], "{:.2f}"),
    ("latency (ms)", lambda row: row["latency_ms"], "{:.2f}"),
    ("p95 (ms)", lambda row: row["latency_p95_ms"], "{:.2f}"),
    ("PyTorch (ms)", lambda row: row["torch_latency_ms"], "{:.2f}"),
    ("memory (GB)", _memory, "{:.2f}"),
    ("TFLOP/s", lambda row: row["tflops_per_second"], "{:.2f}"),
    ("of peak (%)", _share, "{:.0f}"),
    ("compile (s)", lambda row: row["compile_seconds"], "{:.1f}"),
)


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Lay rows out as a table; columns without any figure are left out.

    Args:
        rows: a report's rows.

    Returns:
        The columns' names and the cells' texts.
    """
    shown = [column for column in _COLUMNS if any(column[1](row) is not None for row in rows)]
    names = ["model", "method", "batch", *[name for name, _, _ in shown]]
    cells = [
        [_model(row), method_name(row), str(row["batch"])]
        + [_cell(read(row), form) for _, read, form in shown]
        for row in rows
    ]
    if any(row["error"] for row in rows):
        names.append("error")
        errors = [(row["error"] or "").replace("|", "\\|") for row in rows]
        cells = [[*cell, error] for cell, error in zip(cells, errors, strict=True)]
    return names, cells


def markdown_table(rows: Sequence[Row]) -> str:
    """Write rows as a Markdown table."""
    names, cells = table(rows)
    rule = ["---", "---", *["---:"] * (len(names) - 2)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (names, rule, *cells))


def csv_table(rows: Sequence[Row]) -> str:
    """Write rows with all their fields as CSV; lists and options are JSON inside a cell."""
    text = io.StringIO()
    fields = list(rows[0]) if rows else []
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = {
            name: json.dumps(value) if isinstance(value, (dict, list)) else value
            for name, value in row.items()
        }
        writer.writerow(nested)
    return text.getvalue()


def _model(row: Row) -> str:
    size = row["resolution"]
    return f"{row['model']} {'x'.join(map(str, size)) if isinstance(size, list) else size}"


def method_name(row: Row) -> str:
    """Name a row's method with its first two options and all that are not at defaults."""
    given = []
    for place, field in enumerate(dataclasses.fields(REDUCERS[row["method"]])):
        value = row["args"][field.name]
        principal = place < 2 and not isinstance(value, bool)
        if value is not None and (principal or value != field.default):
            given.append(f"{field.name}={_value(value)}")
    return f"{row['method']}({', '.join(given)})" if given else row["method"]


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        words = list(map(str, value))
        same = len(words) > 2 and len(set(words)) == 1
        return f"{words[0]} x {len(words)}" if same else " ".join(words)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
