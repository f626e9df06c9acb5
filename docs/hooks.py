"""Tables of the documentation that are made from the code and from measured results.

A line `<!-- options: NAME -->` becomes the table of a method's options, `<!-- results: NAME -->`
what was published and measured of it, and `<!-- command: NAME -->` a command's options.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hvit_jax import REDUCERS, make_reducer
from hvit_jax.commands.flags import options_of
from hvit_jax.commands.main import records
from hvit_jax.fields import flag, show
from hvit_jax.published import published_rows
from hvit_jax.reducers import method_name

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_MARK = re.compile(r"^<!-- (options|results|command): (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the tables into a page; MkDocs calls this for each.

    Raises:
        KeyError: for a method that does not exist.
    """
    tables = {"options": options_table, "results": results_tables, "command": command_tables}
    return _MARK.sub(lambda found: tables[found[1]](found[2]), markdown)


def options_table(method: str) -> str:
    """List a method's options with their flags, defaults and help."""
    rows = []
    for field in dataclasses.fields(REDUCERS[method]):
        flags = [field.metadata["short"], "--" + field.name.replace("_", "-")]
        shown = ", ".join(f"`{flag}`" for flag in flags if flag)
        default = "" if field.default is None else f"`{show(field.default)}`"
        rows.append((f"`{field.name}`", shown, default, field.metadata["help"]))
    return _table(("option", "flag", "default", "meaning"), rows)


def command_tables(name: str) -> str:
    """List a command's options by group, those of its reduction method left out."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for field, _ in options_of(records()[name][1]):
        if field.metadata.get("help") is None:
            continue
        title = field.metadata["group"] or "options"
        groups.setdefault(title, []).append(_option_row(field))
    head = ("field", "flag", "default", "meaning")
    return "\n\n".join(f"**{title}**\n\n{_table(head, rows)}" for title, rows in groups.items())


def _option_row(field: dataclasses.Field) -> tuple[str, ...]:
    if field.metadata["positional"]:
        flags = field.name.upper()
    else:
        flags = ", ".join(filter(None, (field.metadata["short"], flag(field.name))))
    default = field.default
    known = default is not dataclasses.MISSING and default is not None
    shown = show(default) if known else "" if default is None else "required"
    return f"`{field.name}`", f"`{flags}`", shown and f"`{shown}`", field.metadata["help"]


def results_tables(method: str) -> str:
    """Show a method's published rows, and what was measured of it here."""
    parts = [
        "Published (ImageNet-1k, V100, float32):",
        _table(
            ("model", "options", "GFLOPs", "top-1 (%)", "images/s"),
            [
                (row["model"], _given(row), *_shown(row["published"]))
                for row in published_rows()
                if row["method"] == method
            ],
        ),
        "Measured, ViT-B/16 at 384 pixels, float32, two cores of an AMD EPYC, random weights:",
        _table(
            ("options", "GFLOPs", "speed-up over dense"),
            [
                (_given(row), f"{row['gflops']:.1f}", f"{row['speedup_over_dense']:.2f}")
                for row in _results("cpu.json")
                if row["method"] == method
            ],
        ),
        "Measured on the [demo](../demo.md), where the dense model has 90.8 %:",
        _table(
            ("options", "GFLOPs", "top-1 (%)"),
            [
                (_given(row), f"{row['gflops']:.3f}", f"{row['top1']:.1f}")
                for row in _results("demo.json")
                if row["method"] == method
            ],
        ),
    ]
    return "\n\n".join(parts)


def _results(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]


def _shown(published: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(published.get(name, "")) for name in ("gflops", "top1", "throughput"))


def _given(row: dict[str, Any]) -> str:
    """Name the options of a row that are not the method's defaults."""
    options = make_reducer(row["method"], **row["args"]).options()
    return method_name(row["method"], options).partition(" ")[2] or "defaults"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
