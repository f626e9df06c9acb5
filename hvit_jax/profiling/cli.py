"""`python profile.py` and `hvit-profile`: what a reduction method gains on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from hvit_jax.command_line import run
from hvit_jax.errors import InputError
from hvit_jax.evaluation.interrupt import exit_status, sigterm_raises
from hvit_jax.profiling.cases import Case
from hvit_jax.profiling.device import describe_device, use_compilation_cache
from hvit_jax.profiling.measure import NOT_MEASURED, Bench
from hvit_jax.profiling.options import PROGRAM, parse_options, settings
from hvit_jax.profiling.plot import plot
from hvit_jax.profiling.record import Record
from hvit_jax.profiling.report import markdown_table, method_name

SOME_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `hvit-profile --help`.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 1 if rows failed; 2 after a user's mistake; 130 or 143 where Ctrl-C or SIGTERM ended it.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> int:
    options, cases = parse_options(arguments)
    if options.gflops_only:
        return _print_gflops(options, cases)
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    cache = str(use_compilation_cache()) if options.cache else None
    about = {**describe_device(), "settings": _shown(options)}
    record = Record(options.output, about, resume=options.resume)
    where = f"compiled programs are kept in {cache}" if cache else "compiled programs are not kept"
    messages.print(f"{about['device']}, jax {about['versions']['jax']}; {where}")
    status = 0
    try:
        with sigterm_raises():
            rows = _measure(options, cases, record, messages)
    except KeyboardInterrupt as stop:
        messages.print("interrupted; finished rows are kept")
        rows, status = record.rows, exit_status(stop)
    print(markdown_table(rows), end="")
    if options.plot is not None:
        plot(rows, options.plot)
    failed = sum(row["error"] is not None for row in rows)
    return status or (SOME_FAILED if failed else 0)


def _print_gflops(options: argparse.Namespace, cases: list[Case]) -> int:
    rows = [{**case.describe(), "dtype": None, **NOT_MEASURED} for case in cases]
    record = Record(options.output, {"settings": {"gflops_only": True}}, resume=options.resume)
    for row in rows:
        if record.find(row) is None:
            record.add(row)
    print(markdown_table(rows), end="")
    return 0


def _measure(
    options: argparse.Namespace, cases: list[Case], record: Record, messages: Console
) -> list[dict[str, Any]]:
    """Measure the cases that are not finished yet; return the rows of all."""
    bench, rows = None, []
    for number, case in enumerate(cases, 1):
        named = {**case.describe(), "dtype": options.dtype}
        row = record.find(named)
        if row is None:
            messages.print(f"{number}/{len(cases)} {method_name(named)}, batch {case.batch}")
            bench = bench or Bench(settings(options))
            row = _row(bench, case, named)
            record.add(row)
            for line in _lines(row, bench):
                messages.print(line)
        rows.append(row)
    return rows


def _row(bench: Bench, case: Case, named: dict[str, Any]) -> dict[str, Any]:
    try:
        return bench.measure(case)
    except (jax.errors.JaxRuntimeError, FloatingPointError, InputError) as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in reason:
            reason = f"out of memory at batch {case.batch}; a smaller --batch-size needs less"
        return {**named, **NOT_MEASURED, "error": reason}


def _lines(row: dict[str, Any], bench: Bench) -> list[str]:
    """Say what the table has no room for."""
    problems, bench.problems = bench.problems, []
    if row["error"]:
        return [f"  failed: {row['error']}", *problems]
    low, high = row["throughput_range"]
    source = "from the cache" if row["compile_from_cache"] else "cold"
    lines = [
        f"  {row['throughput']:.2f} images/s ({low:.2f} to {high:.2f}), compiled in "
        f"{row['compile_seconds']:.1f} s ({source}); matrix products reach "
        f"{bench.peak / 1e12:.2f} TFLOP/s here",
    ]
    if row["compiler_gflops"] is not None:
        lines.append(
            f"  the compiler counts {row['compiler_gflops']:.1f} GFLOP a batch: loop bodies once, "
            "library calls not at all"
        )
    if row["torch"]:
        lines.append(f"  compared with {row['torch']}")
    return lines + [f"  {problem}" for problem in problems]


def _shown(options: argparse.Namespace) -> dict[str, Any]:
    """Name the settings that numbers depend on."""
    names = ("checkpoint", "dtype", "attention", "unroll", "against", "dense", "latency", "seconds")
    return {name: getattr(options, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
