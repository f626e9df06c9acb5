"""Settings tried on the same pictures: scores, and speed beside the dense model."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hvit_jax.comparing.rows import Trial
from hvit_jax.comparing.scores import SCORES, interval, value_of, values_of_draws
from hvit_jax.comparing.settings import Setting
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.reducer import Reducer
from hvit_jax.profiling.device import Work, rates_and_ratios, time_in_turns
from hvit_jax.published import describe_configuration

# What was measured of every picture (N, ...), by the names of `SCORES`, the first one first.
Values = dict[str, np.ndarray]
_DIGITS = 6  # That count of a draw's score, in files.


@dataclass(frozen=True)
class Program:
    """A setting that is ready to run.

    Attributes:
        work: a batch, to be timed.
        memory_bytes: that a batch needs of each device; None where the compiler does not tell.
        run: runs all pictures, and gives what a bench compares; see `Bench.values`.
    """

    work: Work
    memory_bytes: int | None
    run: Callable[[], Any]


@runtime_checkable
class Bench(Protocol):
    """Runs a model on the pictures, and measures what it makes of them."""

    sizes: ViTConfig
    compute: Compute
    placement: Placement
    batch: int  # Pictures or windows at once, with padding.

    def prepare(self, setting: Setting) -> Program:
        """Compile a setting, whose budgets are given."""
        ...

    def with_budgets(self, setting: Setting) -> Setting:
        """Give a setting the budgets that its pictures need; others stay as they are."""
        ...

    def values(self, found: Any, dense: Any) -> tuple[Values, dict[str, float]]:
        """Measure what `Program.run` has found, beside what it has found under the dense model.

        Returns:
            What was measured of every picture, and sums of what the method reports.

        Raises:
            FloatingPointError: if outputs are not finite.
        """
        ...


@dataclass(frozen=True)
class _Scored:
    """Scores by their names, of the pictures and of their draws, and what the method reports."""

    values: dict[str, float]
    drawn: dict[str, np.ndarray]
    report: dict[str, float]


@dataclass
class Trials:
    """Tries settings on the same pictures."""

    bench: Bench
    seconds: float | None  # How long a round of timing takes, about; None: nothing is timed.
    timer: Callable[..., list[list[float]]] = field(default=time_in_turns)

    def row(self, setting: Setting) -> Trial:
        """Give the row of a setting before it is measured."""
        config = setting.sizes(self.bench.sizes)
        flops = count_flops(config, setting.reducer)
        about = describe_configuration(config, setting.reducer)
        return Trial(
            **{**about, "method": setting.method},
            batch=self.bench.batch,
            dtype=self.bench.compute.dtype,
            gflops=flops / 1e9,
            cost=flops / count_flops(self.bench.sizes, Reducer()),
            tried=setting.tried,
            devices=self.bench.placement.devices,
        )

    def measure(self, setting: Setting) -> Trial:
        """Score the pictures, and time a batch in turns with the dense model.

        Raises:
            FloatingPointError: if outputs are not finite.
            RuntimeError: if the device runs out of memory.
        """
        tried, setting = setting.tried, self.bench.with_budgets(setting)
        dense, _ = self._dense
        if setting.method == Reducer.name:
            program, scored = dense, self._of_dense
        else:
            program = self.bench.prepare(setting)
            scored = self._scored(program.run())
        row = replace(
            self.row(setting),
            tried=tried,
            memory_bytes=program.memory_bytes,
            report=scored.report,
            scores={name: self._score(name, scored) for name in scored.values},
            draws=",".join(f"{each:.{_DIGITS}g}" for each in next(iter(scored.drawn.values()))),
        )
        return row if self.seconds is None else self._timed(row, program, dense)

    def _timed(self, row: Trial, program: Program, dense: Program) -> Trial:
        """Time a batch in turns with the dense model."""
        works = [program.work, *([] if program is dense else [dense.work])]
        rates, ratios = rates_and_ratios(self.timer(works, seconds=self.seconds), self.bench.batch)
        (speedups,) = ratios or [[1.0]]
        return replace(
            row,
            throughput=statistics.median(rates),
            speedup=statistics.median(speedups),
            speedup_range=[min(speedups), max(speedups)],
        )

    @functools.cached_property
    def _dense(self) -> tuple[Program, Any]:
        """The dense model, and what it makes of the pictures."""
        program = self.bench.prepare(Setting(Reducer().resolve(self.bench.sizes)))
        return program, program.run()

    @functools.cached_property
    def _of_dense(self) -> _Scored:
        """The dense model's scores."""
        return self._scored(self._dense[1])

    def _scored(self, found: Any) -> _Scored:
        """Score what `Program.run` has found."""
        values, report = self.bench.values(found, self._dense[1])
        return _Scored(
            {name: value_of(SCORES[name], each) for name, each in values.items()},
            {name: values_of_draws(SCORES[name], each) for name, each in values.items()},
            report,
        )

    def _score(self, name: str, scored: _Scored) -> dict[str, Any]:
        """Give a score, and what it differs from the dense model's."""
        value, drawn = scored.values[name], scored.drawn[name]
        return {
            "value": value,
            "interval": interval(drawn),
            "change": value - self._of_dense.values[name],
            "change_interval": interval(drawn - self._of_dense.drawn[name]),
        }
