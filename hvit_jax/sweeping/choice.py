"""Settings: which are tried, what came of them, and which one to use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvit_jax.config import ViTConfig
from hvit_jax.costs import at_cost
from hvit_jax.models.reducer import Reducer
from hvit_jax.profiling.plot import pareto_front
from hvit_jax.profiling.results import Row
from hvit_jax.reducers import REDUCERS, Budgeted

# Shares of pictures, in per cent, that budgets should suffice for.
_PERCENTILES = (99.0, 75.0, 25.0)
# Shares of the dense model's cost, for methods without candidates of their own.
_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
# Speed-ups are rarely above what GFLOPs promise; below this part of the target nothing is missed.
NEAR = 0.75


@dataclass(frozen=True)
class Candidate:
    """One setting to try.

    Attributes:
        reducer: the method, resolved; one with budgets comes without them.
        percentile: the share of pictures that its budgets should suffice for, once they are
            measured; None for a method without budgets.
    """

    reducer: Reducer
    percentile: float | None = None

    @property
    def tried(self) -> dict[str, Any]:
        """The candidate's options and percentile, as files have them."""
        return {"args": self.reducer.options(), "percentile": self.percentile}


@dataclass(frozen=True, kw_only=True)
class Trial(Row):
    """A row of `hvit sweep`; figures of a candidate that failed are None."""

    tried: dict[str, Any]  # The candidate's options and, for a method with budgets, the percentile.
    devices: int  # How many divided every batch.
    top1: float | None = None  # In per cent.
    drop: float | None = None  # Percentage points lost against dense on the same pictures.
    drop_error: float | None = None  # The standard error of that.
    speedup: float | None = None  # Images per second over the dense model's in the same minutes.
    speedup_range: list[float] | None = None  # The slowest and the fastest round's.
    report: dict[str, float] | None = None  # Sums of what the method reports.
    correct: str | None = None  # For every picture of the sample 1 if it is right, else 0.

    @property
    def key(self) -> tuple:
        """What tells one row from another: what was tried, whatever budgets came of it."""
        return self.method, json.dumps(self.tried, sort_keys=True)

    @property
    def place(self) -> tuple[float, float]:
        """Speed over dense, and top-1."""
        return self.speedup or 0.0, self.top1 or 0.0


@dataclass(frozen=True)
class Skipped:
    """A candidate that is not worth trying: how many multiply-adds it has, and the reason."""

    candidate: Candidate
    flops: int
    reason: str


@dataclass
class Sweep:
    """What a sweep has come to."""

    rows: list[Trial] = field(default_factory=list)  # Of what was tried, now or before.
    skipped: list[Skipped] = field(default_factory=list)
    chosen: Trial | None = None  # None without a goal, or if nothing is faster than dense.
    reached: bool = True  # Whether the chosen setting reaches the goal; True without one.


@dataclass(frozen=True)
class Goal:
    """What is wanted: a speed over dense, or at most so many percentage points of top-1 lost."""

    speedup: float | None = None
    drop: float | None = None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} x dense"
        return f"a drop of at most {self.drop:g}"

    def reached(self, row: Trial) -> bool:
        """Tell whether a measured candidate is good enough, and faster than dense."""
        speedup, _ = row.place
        if self.speedup is not None:
            return speedup >= self.speedup
        return (row.drop or 0.0) <= (self.drop or 0.0) and speedup > 1

    def hopeless(self, flops: int, dense: int) -> str | None:
        """Say why a candidate of so many multiply-adds need not be tried, if so."""
        if flops >= dense:
            return "as many GFLOPs as dense, or more"
        least = NEAR * (self.speedup or 0.0)
        if dense / flops < least:
            return f"GFLOPs promise less than {least:.2f} x dense, {NEAR:g} of the target"
        return None


def candidates(config: ViTConfig, methods: Iterable[str]) -> list[Candidate]:
    """List the dense model, and for every other method what is worth trying on such a model."""
    found = [Candidate(Reducer().resolve(config))]
    for method in methods:
        settings = [each.resolve(config) for each in REDUCERS[method].candidates(config)]
        for reducer in settings or [at_cost(method, config, share) for share in _SHARES]:
            budgets = _PERCENTILES if isinstance(reducer, Budgeted) else (None,)
            found += [Candidate(reducer, percentile) for percentile in budgets]
    # On a small model several settings come to the same.
    return list(dict.fromkeys(found))


def front(rows: Sequence[Trial]) -> list[Trial]:
    """Find the candidates that no other beats in both speed and accuracy, from the fastest on."""
    places = {row.place: row for row in reversed(rows) if row.error is None}
    return [places[point] for point in pareto_front(list(places))]


def choose(rows: Sequence[Trial], goal: Goal) -> tuple[Trial | None, bool]:
    """Choose a setting among candidates and the dense model.

    For a speed the most accurate one that reaches it, for a drop the fastest one within it. Where
    none is, the nearest: the fastest of all, or the one that is faster than dense and loses least.

    Returns:
        The setting, None if nothing is faster than dense; and whether it reaches the goal.
    """
    measured = [row for row in rows if row.error is None]
    good = [row for row in measured if goal.reached(row)]
    if good:
        by_accuracy = goal.speedup is not None
        return max(good, key=lambda row: row.place[::-1] if by_accuracy else row.place), True
    faster = [row for row in measured if row.place[0] > 1]
    if goal.speedup is not None:
        return max(faster, key=lambda row: row.place, default=None), False
    return min(faster, key=lambda row: (row.drop or 0.0, -row.place[0]), default=None), False
