"""Adding up what pictures came to, consistent whenever a run is interrupted."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from hvit_jax.dense.stream import Job
from hvit_jax.evaluation.tally import Done


@dataclass(frozen=True)
class Totals(Done):
    """Sums over the pictures mapped so far."""

    windows: int = 0


@dataclass(frozen=True)
class Rows:
    """What neighbouring pictures came to, without those that could not be read."""

    indices: Int[np.ndarray, " m"]  # Places among the pictures.
    measured: Num[np.ndarray, " m *shape"]  # What the metric measured of each.
    problems: tuple[str, ...]  # Which pictures could not be read, and why.
    totals: Totals  # Of these pictures and all before them.
    sum: Num[np.ndarray, " *shape"]  # Of what was measured of them.


@dataclass
class MapTally:
    """What has been measured so far.

    Attributes:
        nothing: what the metric measures of no picture.
        rows: single results; what an earlier run has measured comes first.
    """

    nothing: Num[np.ndarray, " *shape"]
    rows: list[Rows] = field(default_factory=list)
    _finished: float | None = None

    @property
    def totals(self) -> Totals:
        """The sums."""
        return self.rows[-1].totals if self.rows else Totals()

    @property
    def measured(self) -> Num[np.ndarray, " *shape"]:
        """The sum of what was measured."""
        return self.rows[-1].sum if self.rows else self.nothing

    @property
    def skipped(self) -> list[str]:
        """Say which pictures could not be read, and why."""
        return [problem for rows in self.rows for problem in rows.problems]

    def add(
        self,
        measured: Num[np.ndarray, " *shape"] | None,
        job: Job,
        started: float,
        compiling: float = 0.0,
    ) -> None:
        """Add the next picture.

        Args:
            measured: what the metric measured of it; None if it could not be read.
            job: the picture.
            started: the time when the first picture was in hand.
            compiling: seconds that do not count.
        """
        old, now = self.totals, time.perf_counter()
        read, begun = measured is not None, started if self._finished is None else self._finished
        totals = Totals(
            images=old.images + read,
            unreadable=old.unreadable + (not read),
            windows=old.windows + job.windows,
            not_finite=old.not_finite + (not job.finite),
            seconds=old.seconds + max(0.0, now - begun - compiling),
            waited=old.waited + job.waited,
        )
        values = (self.nothing if measured is None else measured)[None]
        indices = np.array([old.pictures])
        problems = () if read else (job.problem,)
        self._finished = now
        of_all = self.measured + values[0]
        self.rows.append(Rows(indices[: int(read)], values[: int(read)], problems, totals, of_all))

    def pack(self, rows: Sequence[Rows]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Join rows, and write them as arrays and what JSON can hold."""
        arrays = {
            name: np.concatenate([getattr(row, name) for row in rows])
            for name in ("indices", "measured")
        }
        arrays["sum"] = rows[-1].sum
        problems = [problem for row in rows for problem in row.problems]
        return arrays, {"totals": vars(rows[-1].totals), "problems": problems}

    def unpack(self, arrays: Mapping[str, np.ndarray], about: dict[str, Any]) -> Rows:
        """Read what `pack` wrote."""
        totals = Totals(**about["totals"])
        indices, measured, of_all = (arrays[name] for name in ("indices", "measured", "sum"))
        return Rows(indices, measured, tuple(about["problems"]), totals, of_all)
