"""Measuring many cases, of which some may fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError, first_line
from hvit_jax.profiling.cases import Case
from hvit_jax.profiling.measure import NOT_MEASURED, Bench, Settings
from hvit_jax.profiling.record import Record
from hvit_jax.profiling.report import method_name
from hvit_jax.system.memory import describe_out_of_memory, is_out_of_memory, smaller_batch

# What may stop one case only. JAX's and PyTorch's errors are RuntimeErrors, out of memory too.
FAILURES = (RuntimeError, MemoryError, FloatingPointError, InputError)


def run_cases(
    cases: Sequence[Case], settings: Settings, record: Record, messages: Console
) -> list[dict[str, Any]]:
    """Measure the cases that are not finished yet; one that fails does not stop the others.

    Args:
        cases: what to measure.
        settings: how.
        record: takes each row as soon as it is finished, and has those of an earlier run.
        messages: where to say how far it is.

    Returns:
        The rows of all cases, in order.

    Raises:
        InputError: if the record cannot be written.
    """
    bench, rows = None, []
    for number, case in enumerate(cases, 1):
        named = {**case.describe(), "dtype": settings.dtype}
        row = record.find(named)
        if row is None:
            messages.print(f"{number}/{len(cases)} {method_name(named)}, batch {case.batch}")
            bench = bench or Bench(settings)
            row = _row(bench, case, named)
            record.add(row)
            for line in _lines(row, bench):
                messages.print(line)
        rows.append(row)
    return rows


def _row(bench: Bench, case: Case, named: dict[str, Any]) -> dict[str, Any]:
    row = {**named, **NOT_MEASURED}
    try:
        return row | bench.measure(case)
    except FAILURES as error:
        return row | {"error": describe_failure(error, case.batch)}


def describe_failure(error: Exception, batch: int) -> str:
    """Say in one line why a case failed.

    Args:
        error: one of `FAILURES`.
        batch: images at once.
    """
    if is_out_of_memory(error):
        return describe_out_of_memory(batch, smaller_batch(batch))
    return first_line(error)


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
