"""Rows: what came of settings, which are the best, and which one to use."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hvit_jax.comparing.scores import SCORES, interval
from hvit_jax.comparing.settings import LOWRES, Setting, name_of
from hvit_jax.config import ViTConfig
from hvit_jax.profiling.plot import pareto_front
from hvit_jax.profiling.results import Row
from hvit_jax.reducers import Reducer, make_reducer, method_class


@dataclass(frozen=True, kw_only=True)
class Trial(Row):
    """A row of `hvit compare`; figures of a setting that failed are None or missing."""

    tried: dict[str, Any]  # The options and, where budgets were measured, the percentile.
    devices: int  # How many divided every batch.
    cost: float  # Multiply-adds over the dense model's.
    # By name of the score, the first one first: its `value`, its `interval`, the `change` against
    # dense, and the `change_interval`.
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    draws: str = ""  # The first score of every draw, with commas between; see `scores.draws`.
    speedup: float | None = None  # Images per second over the dense model's in the same minutes.
    speedup_range: list[float] | None = None  # The slowest and the fastest round's.
    memory_bytes: int | None = None  # That a batch needs of each device, as the compiler plans it.
    report: dict[str, float] | None = None  # Sums of what the method reports.

    @property
    def key(self) -> tuple:
        """What tells one row from another: what was tried, whatever budgets came of it."""
        return self.method, tuple(self.resolution), json.dumps(self.tried, sort_keys=True)

    @property
    def name(self) -> str:
        """The method with its main options."""
        return name_of(self.method, self.args, self.size)

    def setting(self, config: ViTConfig) -> Setting:
        """Give the setting for a model of these sizes; budgets are those that were measured."""
        resolution = self.shape if self.method == LOWRES else None
        return Setting(self.reducer.resolve(config), resolution=resolution)

    @property
    def reducer(self) -> Reducer:
        """The method that ran; at a lower resolution none did."""
        return Reducer() if self.method == LOWRES else make_reducer(self.method, **self.args)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        height, width = self.resolution
        return height, width

    @property
    def is_baseline(self) -> bool:
        """Tell whether this is what a method should be better than."""
        return self.method == LOWRES or method_class(self.method).baseline

    @property
    def first(self) -> str:
        """The name of the score that settings are chosen by."""
        return next(iter(self.scores))

    @property
    def value(self) -> float:
        """Its value."""
        return self.scores[self.first]["value"]

    @property
    def drawn(self) -> np.ndarray:
        """Its value in every draw."""
        return np.array(self.draws.split(","), float)

    @property
    def loss(self) -> float:
        """How much of it is lost against dense."""
        return -SCORES[self.first].better * self.scores[self.first]["change"]

    @property
    def place(self) -> tuple[float, float]:
        """Speed over dense, and the score; both are the better the larger."""
        return self.speedup or 0.0, SCORES[self.first].better * self.value


@dataclass
class Comparison:
    """What a comparison has come to."""

    pictures: int  # How many were taken.
    rows: list[Trial] = field(default_factory=list)  # Of what was tried, now or before.
    left_out: dict[str, str] = field(default_factory=dict)  # What was not tried, by method.
    chosen: Trial | None = None  # None if nothing is faster than dense.
    reached: bool = True  # Whether the chosen setting reaches the goal.
    rivals: list[Trial] = field(default_factory=list)  # Baselines that are as good as it.


@dataclass(frozen=True)
class Goal:
    """What is wanted: a speed over dense, or at most so much of the first score lost."""

    speedup: float | None = None
    drop: float | None = None  # None without a speed: what `Score.tolerated` says.

    def of(self, dense: Trial) -> Goal:
        """Fill in what is open, for a dense model's row."""
        if self.speedup is not None or self.drop is not None:
            return self
        return Goal(drop=SCORES[dense.first].tolerated(dense.value))

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} x dense"
        return f"a loss of at most {self.drop:.3g}"

    def reached(self, row: Trial) -> bool:
        """Tell whether a setting is good enough, and faster than dense."""
        speedup = row.speedup or 0.0
        if self.speedup is not None:
            return speedup >= self.speedup
        # Differences of percentages are rounded: one point may come to a little more.
        return row.loss <= (self.drop or 0.0) + 1e-9 and speedup > 1


def measured(rows: Sequence[Trial]) -> list[Trial]:
    """List the rows that did not fail."""
    return [row for row in rows if row.error is None]


def front(rows: Sequence[Trial]) -> list[Trial]:
    """Find the settings that no other beats in both speed and score, from the fastest on."""
    places = {row.place: row for row in reversed(measured(rows))}
    return [places[point] for point in pareto_front(list(places))]


def choose(rows: Sequence[Trial], goal: Goal) -> tuple[Trial | None, bool]:
    """Choose a setting among those tried and the dense model.

    For a speed the best one that reaches it, for a loss the fastest one within it. Where none is,
    the nearest: the fastest of all, or the one that is faster than dense and loses least.

    Returns:
        The setting, None if nothing is faster than dense; and whether it reaches the goal.
    """
    good = [row for row in measured(rows) if goal.reached(row)]
    if good:
        by_score = goal.speedup is not None
        return max(good, key=lambda row: row.place[::-1] if by_score else row.place), True
    faster = [row for row in measured(rows) if row.place[0] > 1]
    if goal.speedup is not None:
        return max(faster, key=lambda row: row.place, default=None), False
    return min(faster, key=lambda row: (row.loss, -row.place[0]), default=None), False


def difference(row: Trial, other: Trial) -> tuple[float, list[float]]:
    """Subtract another setting's first score, on the same pictures, with the 95 % interval."""
    return row.value - other.value, interval(row.drawn - other.drawn)


def is_worse(row: Trial, other: Trial) -> bool:
    """Tell whether a setting is worse than another one, as far as the pictures tell."""
    better = SCORES[row.first].better
    high = max(better * end for end in difference(row, other)[1])
    return high < 0


def at_level(rows: Sequence[Trial], level: float) -> list[Trial]:
    """Give each method's setting of the highest cost that is not above a level, best first."""
    below: dict[str, Trial] = {}
    for row in measured(rows):
        if row.cost <= level and row.method != "dense":
            best = below.get(row.method)
            below[row.method] = row if best is None or row.cost > best.cost else best
    return sorted(below.values(), key=lambda row: row.place[1], reverse=True)


def lowres_at(rows: Sequence[Trial], cost: float) -> Trial | None:
    """Give what lower resolutions come to at a cost, linear in it between the two measured beside.

    That is what some pictures at the one and the others at the other would cost and reach. Dense
    counts as the largest. None where there are no two such resolutions.
    """
    sizes = [row for row in measured(rows) if row.method in (LOWRES, Reducer.name)]
    for less, more in itertools.pairwise(sorted(sizes, key=lambda row: row.cost)):
        if less.cost <= cost <= more.cost:
            share = (cost - less.cost) / (more.cost - less.cost)
            value = (1 - share) * less.value + share * more.value
            drawn = (1 - share) * less.drawn + share * more.drawn
            scores = {less.first: {"value": value}}
            return replace(less, cost=cost, scores=scores, draws=",".join(map(str, drawn)))
    return None


def verdict(row: Trial, there: Sequence[Trial], rows: Sequence[Trial]) -> str:
    """Say whether a setting is better than the best baseline beside it, and by how much.

    Resolutions are few, and the one below may cost much less: `lowres_at` makes up for that.

    Args:
        row: the setting.
        there: all settings of its level of cost.
        rows: all settings.
    """
    if row.is_baseline:
        return "a baseline"
    baselines = {each.name: each for each in there if each.is_baseline}
    if (between := lowres_at(rows, row.cost)) is not None:
        baselines = {name: each for name, each in baselines.items() if each.method != LOWRES}
        baselines[f"{LOWRES} at {row.cost:.2f}"] = between
    if not baselines:
        return ""
    name, best = max(baselines.items(), key=lambda pair: pair[1].place[1])
    apart, ends = difference(row, best)
    word = "worse than" if is_worse(row, best) else "not told from"
    word = "better than" if is_worse(best, row) else word
    change, ends = SCORES[row.first].show_change(apart, ends)
    return f"{word} {name} ({change}, {ends})"


def rivals(rows: Sequence[Trial], chosen: Trial) -> list[Trial]:
    """Find the baselines that are as good as a setting and cost no more, the fastest first.

    A setting that is a baseline itself has none.
    """
    if chosen.is_baseline:
        return []
    found = [
        row
        for row in measured(rows)
        if row.is_baseline and row is not chosen and row.cost <= chosen.cost
    ]
    good = [row for row in found if not is_worse(row, chosen)]
    return sorted(good, key=lambda row: row.place[0], reverse=True)


def csv_table(rows: Sequence[Trial]) -> str:
    """Write rows, at least one, a line each, with the scores in columns of their own."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    plain = ("method", "resolution", "cost", "gflops", "throughput", "speedup")
    plain += ("memory_bytes", "batch", "dtype", "devices", "error")
    parts = ("", "_low", "_high", "_change", "_change_low", "_change_high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *plain, "args", *(name + part for name in names for part in parts)])
    for row in rows:
        cells = [row.name, *(getattr(row, name) for name in plain), row.args]
        for name in names:
            score = row.scores.get(name)
            cells += 6 * [None] if score is None else _numbers(score)
        writer.writerow(json.dumps(x) if isinstance(x, dict | list) else x for x in cells)
    return text.getvalue()


def _numbers(score: dict[str, Any]) -> list[float]:
    return [score["value"], *score["interval"], score["change"], *score["change_interval"]]


def show_score(row: Trial, name: str) -> str:
    """Write a score."""
    return SCORES[name].form.format(row.scores[name]["value"])


def show_change(row: Trial, name: str) -> str:
    """Write how a score differs from the dense model's, with the 95 % interval."""
    if row.method == "dense":
        return ""
    score = row.scores[name]
    change, ends = SCORES[name].show_change(score["change"], score["change_interval"])
    return f"{change} ({ends})"
