"""`python profile.py` and `hvit profile`: what a reduction method gains on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from hvit_jax.checkpoint import describe_checkpoint
from hvit_jax.profiling.accuracy import published_top1
from hvit_jax.profiling.cases import Case
from hvit_jax.profiling.device import describe_device, use_compilation_cache
from hvit_jax.profiling.measure import NOT_MEASURED, SEED
from hvit_jax.profiling.options import PROGRAM, parse_options, settings
from hvit_jax.profiling.plot import plot
from hvit_jax.profiling.record import Record
from hvit_jax.profiling.report import markdown_table
from hvit_jax.profiling.run import run_cases
from hvit_jax.system.run import run
from hvit_jax.system.signals import exit_status, sigterm_raises

SOME_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `hvit profile --help`.

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
    cache = use_compilation_cache(options.cache)
    about = _about(options)
    record = Record(options.output, about, resume=options.resume)
    where = f"compiled programs are kept in {cache}" if cache else "compiled programs are not kept"
    messages.print(f"{about['device']}, jax {about['versions']['jax']}; {where}")
    if jax.local_device_count() > 1:
        messages.print(f"measures one of the {jax.local_device_count()} devices")
    status = 0
    try:
        with sigterm_raises():
            rows = run_cases(cases, settings(options), record, messages)
    except KeyboardInterrupt as stop:
        messages.print("interrupted; finished rows are kept")
        rows, status = record.rows, exit_status(stop)
    if rows:
        print(markdown_table(rows), end="")
    if options.plot is not None and status == 0:
        _plot(options, record.rows, messages)
    failed = sum(row["error"] is not None for row in rows)
    return status or (SOME_FAILED if failed else 0)


def _plot(options: argparse.Namespace, rows: list[dict[str, Any]], messages: Console) -> None:
    """Draw all rows of the files, those of earlier runs too."""
    if options.accuracy is None:
        plot(rows, options.plot, published_top1, "published")
        return
    for name in options.accuracy.missing(rows):
        messages.print(f"not drawn, since no file of --accuracy is of it: {name}")
    plot(rows, options.plot, options.accuracy.top1, "measured")


def _print_gflops(options: argparse.Namespace, cases: list[Case]) -> int:
    rows = [{**case.describe(), "dtype": None, **NOT_MEASURED} for case in cases]
    record = Record(options.output, _about(options), resume=options.resume)
    for row in rows:
        if record.find(row) is None:
            record.add(row)
    print(markdown_table(rows), end="")
    return 0


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """Name what numbers depend on."""
    names = ("checkpoint", "dtype", "attention", "unroll", "against", "dense", "latency", "seconds")
    settings = {name: getattr(options, name) for name in (*names, "gflops_only")}
    return {
        **describe_device(torch=options.against == "torch"),
        "settings": settings,
        "seed": SEED,
        **describe_checkpoint(options.checkpoint),
    }


if __name__ == "__main__":
    sys.exit(main())
