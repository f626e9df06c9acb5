"""Trying all candidates, of which some may fail and some are not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.profiling.record import Record
from hvit_jax.profiling.report import method_name
from hvit_jax.profiling.run import FAILURES, describe_failure
from hvit_jax.published import describe_configuration
from hvit_jax.reducers import Reducer
from hvit_jax.sweeping.bench import NOT_MEASURED, Bench
from hvit_jax.sweeping.choice import Goal
from hvit_jax.sweeping.grid import DENSE, Candidate

NAMES = ("method", "tried")


@dataclass(frozen=True)
class Skipped:
    """A candidate that is not worth trying, its multiply-adds, and the reason."""

    candidate: Candidate
    flops: int
    reason: str


@dataclass
class Progress:
    """What a sweep has come to so far.

    Attributes:
        rows: of the candidates that were tried, now or before.
        skipped: those that were not tried.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def run_candidates(
    found: Sequence[Candidate],
    bench: Bench,
    goal: Goal | None,
    record: Record,
    progress: Progress,
    messages: Console,
) -> None:
    """Try the candidates that are not finished yet.

    Where the goal makes all of them hopeless, the one with fewest GFLOPs is tried nevertheless, so
    that there is a nearest one to name.

    Args:
        found: the candidates, the dense model first.
        bench: measures them.
        goal: decides which are not worth it; None to try all.
        record: takes each row as soon as it is finished, and has those of an earlier run.
        progress: gets every row; an interrupt leaves in it what was tried before.
        messages: where to say how far it is.

    Raises:
        InputError: if the dense model fails, or the record cannot be written.
    """
    hidden = not messages.is_terminal

    def run(candidate: Candidate, goal: Goal | None, place: str) -> None:
        row = record.find(candidate.describe())
        if row is None:
            row = _try(candidate, bench, goal, progress, messages, place)
            if row is None:
                return
            record.add(row)
        if row["method"] == DENSE:
            _keep_dense(row, bench)
        progress.rows.append(row)

    for number, candidate in enumerate(track(found, "trying", console=messages, disable=hidden), 1):
        run(candidate, goal, f"{number}/{len(found)}")
    if progress.skipped and all(row["method"] == DENSE for row in progress.rows):
        least = min(progress.skipped, key=lambda each: each.flops)
        progress.skipped.remove(least)
        run(least.candidate, None, "fewest GFLOPs:")


def _try(
    candidate: Candidate,
    bench: Bench,
    goal: Goal | None,
    progress: Progress,
    messages: Console,
    place: str,
) -> dict[str, Any] | None:
    """Measure one candidate; None if it is not worth it."""
    reducer = candidate.reducer
    try:
        reducer = bench.with_budgets(candidate)
        if goal is not None and reducer.name != DENSE:
            flops = count_flops(bench.config, reducer)
            reason = goal.hopeless(flops, count_flops(bench.config, Reducer()))
            if reason is not None:
                progress.skipped.append(Skipped(candidate, flops, reason))
                return None
        row = _describe(candidate, reducer, bench)
        messages.print(f"{place} {method_name(row)}")
        row |= bench.measure(reducer)
    except FAILURES as error:
        failure = describe_failure(error, bench.sample.batch_size)
        row = _describe(candidate, reducer, bench) | {"error": failure}
        messages.print(f"{place} {method_name(row)} failed: {failure}")
    return row


def _describe(candidate: Candidate, reducer: Reducer, bench: Bench) -> dict[str, Any]:
    return {
        **describe_configuration(bench.config, reducer),
        **candidate.describe(),
        "batch": bench.sample.batch_size,
        "devices": bench.placement.devices,
        "dtype": bench.dtype,
        "gflops": count_flops(bench.config, reducer) / 1e9,
        **NOT_MEASURED,
    }


def _keep_dense(row: dict[str, Any], bench: Bench) -> None:
    """Every other candidate is compared with the dense model."""
    if row["error"] is not None:
        raise InputError(f"the dense model, which all others are compared with: {row['error']}")
    bench.dense_correct = np.array([right == "1" for right in row["correct"]])
