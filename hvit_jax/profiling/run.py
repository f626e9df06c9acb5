"""Profiling from beginning to end: checks, cases of which some may fail, results, picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from rich.console import Console

from hvit_jax.checkpoint import (
    checkpoint_sha256,
    choose_method,
    describe_checkpoint,
    read_description,
)
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError, first_line
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.profiling.bench import RIVALS, SEED, Profiler
from hvit_jax.profiling.cases import Case, make_case, published_cases, with_dense
from hvit_jax.profiling.config import ProfileConfig
from hvit_jax.profiling.device import describe_device
from hvit_jax.profiling.plot import Accuracies, plot, published_top1, read_accuracies
from hvit_jax.profiling.results import Measurement, Results, table
from hvit_jax.reducers import Reducer, warn_without_budgets
from hvit_jax.system.figures import check_plot
from hvit_jax.system.files import check_writable, refuse_existing
from hvit_jax.system.library_messages import is_out_of_memory
from hvit_jax.system.memory import describe_out_of_memory, smaller_batch
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, print_table
from hvit_jax.system.signals import sigterm_raises

# Options that numbers depend on, beside those that a row names itself.
SETTINGS = ("checkpoint", "against", "dense", "latency", "seconds", "gflops_only", "compute")
# What may stop one case only. JAX's and PyTorch's errors are RuntimeErrors, out of memory too.
FAILURES = (RuntimeError, MemoryError, FloatingPointError, InputError)


def profile(
    config: ProfileConfig,
    *,
    console: Console | None = None,
    messages: Console | None = None,
    bench: Profiler | None = None,
) -> list[Measurement]:
    """Measure what `hvit profile` is asked for, print it as a table, and write what is wanted.

    Args:
        config: what to measure, and how.
        console: where the table is printed; default: stdout.
        messages: where progress goes; default: stderr.
        bench: measures the cases; default: made of `config`.

    Returns:
        The rows of all cases, in order; a case that failed has its `error`.

    Raises:
        InputError: for anything in the configuration that is wrong, or a file that cannot be
            written.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM; finished rows are printed.
    """
    refuse_several("hvit profile")
    console, messages = console or plain_console(), messages or plain_console(stderr=True)
    if config.rows is not None:
        cases = published_cases(config.rows, batch=config.batch_size)
    else:
        reducer = _method(config, messages)
        config = dataclasses.replace(config, reducer=reducer)  # For the profiler too.
        cases = [make_case(config.sizes, reducer, config.batch_size)]
    cases = [dataclasses.replace(case, batch=size) for case in cases for size in config.batches]
    if config.trace is not None:
        refuse_existing(config.trace)
        check_writable(config.trace)
    if config.against is not None:  # What it lacks is found before anything is computed.
        for sizes in dict.fromkeys(case.config for case in cases):
            RIVALS[config.against].check(sizes)
    top1 = _accuracies(config, [case.row() for case in cases])
    results = open_results(config)
    if config.gflops_only:
        bench = None
    else:
        cache = use_compilation_cache(config.cache)
        kept = f"kept in {cache}" if cache else "not kept"
        device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        messages.print(f"{device}; compiled programs are {kept}")
        warn_if_slow(config.compute.dtype, messages.print)
        if jax.local_device_count() > 1:
            messages.print(f"only one of the {jax.local_device_count()} devices is measured")
        cases, bench = with_dense(cases) if config.dense else cases, bench or Profiler(config)
    try:
        with sigterm_raises():
            rows = run_cases(cases, bench, results, messages)
    except KeyboardInterrupt as stop:
        if results.rows:
            print_rows(console, results.rows)
        kept = "are kept" if config.output else "are only printed without --output"
        raise type(stop)(f"interrupted; finished rows {kept}") from stop
    print_rows(console, rows)
    if config.plot is not None:
        # All rows of the files, those of earlier runs too.
        kind = "measured" if config.accuracy else "published"
        missing = [row for row in results.rows if config.accuracy and top1(row) is None]
        for name in dict.fromkeys(f"{row.model} {row.name}" for row in missing):
            messages.print(f"not drawn, since --accuracy has no results file for it: {name}")
        plot(results.rows, config.plot, top1, kind)
    return rows


def _method(config: ProfileConfig, messages: Console) -> Reducer:
    """Choose the method to measure: the one asked for, else the checkpoint's, else dense."""
    if config.checkpoint is None:
        return config.reducer or Reducer()
    return choose_method(config.reducer, read_description(config.checkpoint), messages.print)


def print_rows(console: Console, rows: Sequence[Measurement]) -> None:
    """Print rows as a table, and why some have no figures."""
    head, *cells = table(rows)
    print_table(console, head, cells, names=3)
    for row in rows:
        if row.error is not None:
            console.print(f"failed: {row.model} {row.size}, {row.name}: {row.error}")


def _accuracies(config: ProfileConfig, rows: Sequence[Measurement]) -> Accuracies:
    """Say how --plot finds a row's top-1, and refuse a plot that would be empty."""
    if config.plot is not None:
        check_plot(config.plot, "--plot")
    if config.accuracy:
        timed = None if config.checkpoint is None else checkpoint_sha256(config.checkpoint)
        measured = read_accuracies(config.accuracy, timed)
        if not any(row.configuration in measured for row in rows):
            raise InputError(
                "none of the --accuracy files is for a configuration that is measured here"
            )
        return lambda row: measured.get(row.configuration)
    if config.plot is not None and not any(map(published_top1, rows)):
        raise InputError(
            "--plot draws published accuracies, and this configuration has none; "
            "--accuracy RESULTS.json draws measured ones"
        )
    return published_top1


def open_results(config: ProfileConfig) -> Results[Measurement]:
    """Open the files of --output; see `Results`."""
    beside = RIVALS[config.against].packages if config.against else ()
    about = {
        **describe_device(beside=beside),
        "seed": SEED,
        **describe_checkpoint(config.checkpoint),
    }
    options = {"settings": SETTINGS, "but": ("--dtype",), "resume": config.resume}
    return Results(config.output, Measurement, config, about, **options)


def run_cases(
    cases: Sequence[Case], bench: Profiler | None, results: Results[Measurement], messages: Console
) -> list[Measurement]:
    """Measure the cases that `results` does not have yet; without a bench, count only.

    One that fails does not stop the others. Each row is written as soon as it is finished.

    Returns:
        The rows of all cases, in order.
    """
    rows = []
    for number, case in enumerate(cases, 1):
        named = case.row(bench and bench.config.compute.dtype)
        row = results.find(named)
        if row is None:
            row = named
            if bench is not None:
                messages.print(f"{number}/{len(cases)} {named.name}, batch {case.batch}")
                warn_without_budgets(case.reducer, case.config, messages.print)
                try:
                    row = bench.measure(case)
                except FAILURES as error:
                    row = dataclasses.replace(named, error=describe_failure(error, case.batch))
                messages.print("\n".join([_line(row, bench), *map("  {}".format, bench.problems)]))
            results.add(row)
        rows.append(row)
    return rows


def describe_failure(error: Exception, batch: int) -> str:
    """Say in one line why a case failed with one of `FAILURES`."""
    if is_out_of_memory(error):
        return describe_out_of_memory(batch, smaller_batch(batch))
    return first_line(error)


def _line(row: Measurement, bench: Profiler) -> str:
    """Say what the table has no room for."""
    if row.error is not None:
        return f"  failed: {row.error}"
    low, high = row.throughput_range or (0.0, 0.0)
    source = "from the cache" if row.compile_from_cache else "cold"
    rival = f"\n  compared with {row.rival}" if row.rival else ""
    return (
        f"  {row.throughput:.2f} images/s ({low:.2f} to {high:.2f}), compiled in "
        f"{row.compile_seconds:.1f} s ({source}); matrix products reach "
        f"{bench.peak / 1e12:.2f} TFLOP/s here{rival}"
    )
