"""What a sweep prints: the front, and the setting to use as commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from hvit_jax.commands.method_options import command_words, given_options
from hvit_jax.profiling.report import method_name
from hvit_jax.published import row_arguments
from hvit_jax.reducers import make_reducer
from hvit_jax.sweeping.options import Options

Row = dict[str, Any]


def front_table(rows: Sequence[Row], chosen: Row | None) -> str:
    """Write the front as a Markdown table, with what is uncertain about it.

    Args:
        rows: the front's.
        chosen: the setting to use, which is marked.
    """
    many = {row["devices"] for row in rows} - {1}
    on = f" on {many.pop()} devices" if many else ""
    lines = [
        f"| | method | GFLOPs | top-1 (%) | against dense | images/s{on} | x dense | rounds |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for number, row in enumerate(rows, 1):
        mark = " **use**" if row is chosen else ""
        low, high = row["speedup_range"]
        lines.append(
            f"| {number} | {method_name(row)}{mark} | {row['gflops']:.3f} | {row['top1']:.1f} | "
            f"{change(row)} | {row['throughput']:.1f} | {row['speedup']:.2f} | "
            f"{low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def change(row: Row) -> str:
    """Tell what accuracy a candidate gains or loses against dense, and the standard error."""
    if row["method"] == "dense":
        return ""
    return f"{0.0 - row['drop']:+.1f} ± {row['drop_error']:.1f}"


def summary(row: Row) -> str:
    """Put a setting in a few words."""
    on = f" on {row['devices']} devices" if row["devices"] > 1 else ""
    speed = f"{row['speedup']:.2f} x dense{on}"
    return f"{method_name(row)}: top-1 {change(row)} against dense, {speed}"


def commands(row: Row, options: Options) -> tuple[str, str]:
    """Write a setting as a command that evaluates it on all pictures, and as Python.

    Args:
        row: the setting.
        options: the sweep's, which it is to run under too.
    """
    reducer = make_reducer(row["method"], **row_arguments(row))
    words = ["python", "eval.py"]
    words += [] if options.demo else [options.data, "--checkpoint", options.checkpoint]
    words += [*command_words(reducer), *options.model_words, "-b", str(options.batch_size)]
    folder = "hvit_jax.demo.checkpoint_dir()" if options.demo else repr(options.checkpoint)
    given = {**given_options(reducer), **options.model_options}
    arguments = "".join(f", {name}={value!r}" for name, value in given.items())
    return shlex.join(words), f"hvit_jax.load({folder}, {reducer.name!r}{arguments})"
