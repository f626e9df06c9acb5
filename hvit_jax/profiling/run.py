"""Profiling from beginning to end: checks, cases of which some may fail, results, picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from hvit_jax.checkpoint import checkpoint_sha256, describe_checkpoint
from hvit_jax.convert.reader import import_torch
from hvit_jax.errors import InputError, first_line
from hvit_jax.profiling.bench import SEED, Profiler
from hvit_jax.profiling.cases import Case, cases_of, with_dense
from hvit_jax.profiling.config import ProfileConfig
from hvit_jax.profiling.device import describe_device, use_compilation_cache
from hvit_jax.profiling.plot import Accuracies, plot
from hvit_jax.profiling.results import Results
from hvit_jax.profiling.rows import Measurement, Row, markdown_table
from hvit_jax.system.figures import check_plot
from hvit_jax.system.files import check_destination, refuse_existing
from hvit_jax.system.library_messages import is_out_of_memory
from hvit_jax.system.memory import describe_out_of_memory, smaller_batch
from hvit_jax.system.signals import sigterm_raises

# Options that numbers depend on, beside those that a row names itself.
SETTINGS = (
    "checkpoint",
    "attention",
    "unroll",
    "against",
    "dense",
    "latency",
    "seconds",
    "gflops_only",
)
# What may stop one case only. JAX's and PyTorch's errors are RuntimeErrors, out of memory too.
FAILURES = (RuntimeError, MemoryError, FloatingPointError, InputError)


def profile(
    config: ProfileConfig, messages: Console | None = None, bench: Profiler | None = None
) -> list[Measurement]:
    """Measure what `hvit profile` is asked for, print it as a table, and write what is wanted.

    Args:
        config: what to measure, and how.
        messages: where to say how far it is; default: stderr.
        bench: measures the cases; default: made of `config`.

    Returns:
        The rows of all cases, in order; a case that failed has its `error`.

    Raises:
        InputError: for anything in the configuration that is wrong, or a file that cannot be
            written.
        KeyboardInterrupt: if Ctrl-C or SIGTERM came; finished rows have been printed.
    """
    cases = cases_of(config)
    accuracies = _check(config, cases)
    if messages is None:
        messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if config.gflops_only:
        return _count(cases, open_results(config))
    cache = use_compilation_cache(config.cache)
    results = open_results(config)
    where = f"compiled programs are kept in {cache}" if cache else "compiled programs are not kept"
    messages.print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {where}")
    if jax.local_device_count() > 1:
        messages.print(f"measures one of the {jax.local_device_count()} devices")
    cases = with_dense(cases) if config.dense else cases
    try:
        with sigterm_raises():
            rows = run_cases(cases, bench or Profiler(config), results, messages)
    except KeyboardInterrupt as stop:
        print(markdown_table(results.rows) if results.rows else "", end="")
        raise type(stop)("interrupted; finished rows are kept") from stop
    print(markdown_table(rows), end="")
    if config.plot is not None:
        _plot(config, results.rows, accuracies, messages)
    return rows


def _check(config: ProfileConfig, cases: Sequence[Case]) -> Accuracies | None:
    """Find mistakes before anything is measured, and read the accuracies."""
    if config.trace is not None:
        refuse_existing(config.trace)
        check_destination(config.trace, overwrite=False)
    if config.plot is not None:
        check_plot(config.plot, "--plot")
    if config.against == "torch":
        import_torch()
    if config.plot is None:
        return None
    rows = [case.row() for case in cases]
    if not config.accuracy:
        if any(row.published_top1 is not None for row in rows):
            return None
        raise InputError(
            "--plot draws published accuracies, and this configuration has none; "
            "--accuracy RESULTS.json draws measured ones"
        )
    timed = None if config.checkpoint is None else checkpoint_sha256(config.checkpoint)
    accuracies = Accuracies(config.accuracy, timed)
    if all(accuracies.top1(row) is None for row in rows):
        raise InputError("no file of --accuracy is of a configuration that is measured here")
    return accuracies


def open_results(config: ProfileConfig, **about: Any) -> Results[Measurement]:
    """Open the files of --output; see `Results`.

    Args:
        config: names them, and what the numbers depend on.
        **about: more that they depend on.
    """
    about = {
        **describe_device(torch=config.against == "torch"),
        "seed": SEED,
        **describe_checkpoint(config.checkpoint),
        **about,
    }
    return Results(
        config.output,
        Measurement,
        config,
        about,
        settings=SETTINGS,
        resume=config.resume,
        table=markdown_table,
    )


def _count(cases: Sequence[Case], results: Results[Measurement]) -> list[Measurement]:
    rows = [case.row() for case in cases]
    for row in rows:
        if results.find(row) is None:
            results.add(row)
    print(markdown_table(rows), end="")
    return rows


def run_cases(
    cases: Sequence[Case], bench: Profiler, results: Results[Measurement], messages: Console
) -> list[Measurement]:
    """Measure the cases that are not finished yet; one that fails does not stop the others.

    Args:
        cases: what to measure.
        bench: measures them.
        results: takes each row as soon as it is finished, and has those of an earlier run.
        messages: where to say how far it is.

    Returns:
        The rows of all cases, in order.

    Raises:
        InputError: if the results cannot be written.
    """
    rows = []
    for number, case in enumerate(cases, 1):
        named = case.row(bench.compute.dtype)
        row = results.find(named)
        if row is None:
            messages.print(f"{number}/{len(cases)} {named.name}, batch {case.batch}")
            try:
                row = bench.measure(case)
            except FAILURES as error:
                row = dataclasses.replace(named, error=describe_failure(error, case.batch))
            results.add(row)
            for line in _lines(row, bench):
                messages.print(line)
        rows.append(row)
    return rows


def describe_failure(error: Exception, batch: int) -> str:
    """Say in one line why a case failed.

    Args:
        error: one of `FAILURES`.
        batch: images at once.
    """
    if is_out_of_memory(error):
        return describe_out_of_memory(batch, smaller_batch(batch))
    return first_line(error)


def _lines(row: Measurement, bench: Profiler) -> list[str]:
    """Say what the table has no room for."""
    if row.error is not None or row.throughput_range is None:
        return [f"  failed: {row.error}", *bench.problems]
    low, high = row.throughput_range
    source = "from the cache" if row.compile_from_cache else "cold"
    lines = [
        f"  {row.throughput:.2f} images/s ({low:.2f} to {high:.2f}), compiled in "
        f"{row.compile_seconds:.1f} s ({source}); matrix products reach "
        f"{bench.peak / 1e12:.2f} TFLOP/s here",
    ]
    if row.compiler_gflops is not None:
        lines.append(
            f"  the compiler counts {row.compiler_gflops:.1f} GFLOP a batch: loop bodies once, "
            "library calls not at all"
        )
    if row.torch:
        lines.append(f"  compared with {row.torch}")
    return lines + [f"  {problem}" for problem in bench.problems]


def _plot(
    config: ProfileConfig,
    rows: Sequence[Measurement],
    accuracies: Accuracies | None,
    messages: Console,
) -> None:
    """Draw all rows of the files, those of earlier runs too."""
    assert config.plot is not None
    if accuracies is None:
        plot(rows, config.plot, _published_top1, "published")
        return
    for name in accuracies.missing(rows):
        messages.print(f"not drawn, since no file of --accuracy is of it: {name}")
    plot(rows, config.plot, accuracies.top1, "measured")


def _published_top1(row: Row) -> float | None:
    return row.published_top1 if isinstance(row, Measurement) else None
