"""Trying all candidates, of which some may fail and some are not worth it."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from hvit_jax.errors import InputError
from hvit_jax.flops import count_flops
from hvit_jax.presets import describe_configuration
from hvit_jax.profiling.record import Record
from hvit_jax.profiling.report import method_name
from hvit_jax.profiling.run import FAILURES, describe_failure
from hvit_jax.reducers import Reducer
from hvit_jax.sweeping.bench import NOT_MEASURED, Bench
from hvit_jax.sweeping.choice import Goal
from hvit_jax.sweeping.grid import DENSE, Candidate

NAMES = ("method", "tried")


@dataclass
class Progress:
    """What a sweep has come to so far.

    Attributes:
        rows: of the candidates that were tried, now or before.
        skipped: how many were not tried, by the reason.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: collections.Counter[str] = field(default_factory=collections.Counter)


def run_candidates(
    found: Sequence[Candidate],
    bench: Bench,
    goal: Goal | None,
    record: Record,
    progress: Progress,
    messages: Console,
) -> None:
    """Try the candidates that are not finished yet.

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
    for number, candidate in enumerate(track(found, "trying", console=messages, disable=hidden), 1):
        row = record.find(candidate.describe())
        if row is None:
            row = _try(candidate, bench, goal, progress, messages, f"{number}/{len(found)}")
            if row is None:
                continue
            record.add(row)
        if row["method"] == DENSE:
            _keep_dense(row, bench)
        progress.rows.append(row)


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
        reason = _reason(reducer, bench, goal)
        if reason is not None:
            progress.skipped[reason] += 1
            return None
        row = _describe(candidate, reducer, bench)
        messages.print(f"{place} {method_name(row)}")
        row |= bench.measure(reducer)
    except FAILURES as error:
        failure = describe_failure(error, bench.sample.batch_size)
        row = _describe(candidate, reducer, bench) | {"error": failure}
        messages.print(f"{place} {method_name(row)} failed: {failure}")
    return row


def _reason(reducer: Reducer, bench: Bench, goal: Goal | None) -> str | None:
    if goal is None or reducer.name == DENSE:
        return None
    dense = count_flops(bench.config, Reducer())
    return goal.hopeless(count_flops(bench.config, reducer), dense)


def _describe(candidate: Candidate, reducer: Reducer, bench: Bench) -> dict[str, Any]:
    return {
        **describe_configuration(bench.config, reducer),
        **candidate.describe(),
        "batch": bench.sample.batch_size,
        "dtype": bench.dtype,
        "gflops": count_flops(bench.config, reducer) / 1e9,
        **NOT_MEASURED,
    }


def _keep_dense(row: dict[str, Any], bench: Bench) -> None:
    """Every other candidate is compared with the dense model."""
    if row["error"] is not None:
        raise InputError(f"the dense model, which all others are compared with: {row['error']}")
    bench.dense_correct = np.array([right == "1" for right in row["correct"]])
