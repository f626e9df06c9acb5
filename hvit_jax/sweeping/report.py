"""What a sweep shows: the front as a table and a picture, and the setting to use as commands."""

from __future__ import annotations

import collections
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvit_jax.evaluation import EvalConfig
from hvit_jax.fields import given
from hvit_jax.profiling.plot import draw_methods
from hvit_jax.reducers import make_reducer
from hvit_jax.sweeping.choice import Goal, Sweep, Trial, front
from hvit_jax.system.figures import new_figure, save_figure


def report(done: Sweep, goal: Goal | None, evaluation: EvalConfig) -> list[str]:
    """Write what follows the table, with the setting to use.

    `evaluation` is of the same data and checkpoint.
    """
    rows, chosen = done.rows, done.chosen
    reasons = collections.Counter(each.reason for each in done.skipped)
    lines = [
        *(f"skipped {count}: {why} (--all tries them too)" for why, count in reasons.items()),
        *(f"failed: {row.name}: {row.error}" for row in rows if row.error),
    ]
    if goal is None:
        return [*lines, "--target-speedup X or --max-drop POINTS names the setting to use"]
    if chosen is None:
        return [*lines, f"nothing reaches {goal}: none of those tried is faster than dense here"]
    what = f"to use for {goal}" if done.reached else f"nothing reaches {goal}; nearest"
    command, python = commands(chosen, evaluation)
    return [*lines, "", f"{what}: {summary(chosen)}", "", command, "", python]


def table(rows: Sequence[Trial], chosen: Trial | None) -> list[tuple[str, ...]]:
    """Write the front as cells below a row of titles, with what is uncertain about it.

    The dense model comes last, without a number where it is not on the front.
    """
    best = {id(row): str(number) for number, row in enumerate(front(rows), 1)}
    shown = front(rows) + [row for row in rows if row.method == "dense" and id(row) not in best]
    speed = f"images/s{_on_devices(rows[0])}"
    lines = [("", "method", "GFLOPs", "top-1 (%)", "against dense", speed, "x dense", "rounds")]
    for row in shown:
        name = f"{row.name} (use)" if row is chosen else row.name
        low, high = row.speedup_range or (0.0, 0.0)
        figures = f"{row.gflops:.3f}", f"{row.top1:.1f}", _change(row), f"{row.throughput:.1f}"
        ratios = f"{row.speedup:.2f}", f"{low:.2f} to {high:.2f}"
        lines.append((best.get(id(row), ""), name, *figures, *ratios))
    return lines


def _on_devices(row: Trial) -> str:
    return f" on {row.devices} devices" if row.devices > 1 else ""


def _change(row: Trial) -> str:
    """Tell what accuracy a candidate gains or loses against dense, and the standard error."""
    if row.method == "dense":
        return ""
    return f"{0.0 - (row.drop or 0.0):+.1f} ± {row.drop_error:.1f}"


def result(row: Trial) -> str:
    """Put what a candidate came to in one line."""
    if row.error is not None:
        return f"{row.name} failed: {row.error}"
    change = f" ({_change(row)})" if _change(row) else ""
    return (
        f"{row.name}: top-1 {row.top1:.1f} %{change}, {row.throughput:.1f} images/s, "
        f"{row.speedup:.2f} x dense"
    )


def summary(row: Trial) -> str:
    """Put a setting in a few words."""
    speed = f"{row.speedup:.2f} x dense{_on_devices(row)}"
    return f"{row.name}: top-1 {_change(row)} against dense, {speed}"


def commands(row: Trial, evaluation: EvalConfig) -> tuple[str, str]:
    """Write a setting as a command that evaluates it on all pictures, and as Python."""
    reducer = make_reducer(row.method, **row.args)
    words = replace(evaluation, reducer=reducer).words()
    folder = "hvit_jax.demo.checkpoint_dir()"
    if evaluation.checkpoint is not None:
        folder = repr(str(evaluation.checkpoint))
    size = {} if evaluation.resolution is None else {"resolution": evaluation.resolution}
    options = {**given(reducer), **size, **given(evaluation.compute)}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    command = shlex.join(["hvit", "eval", *words])
    return command, f"hvit_jax.load({folder}, {reducer.name!r}{arguments})"


def plot_sweep(rows: Sequence[Trial], chosen: Trial | None, goal: Goal | None, path: Path) -> None:
    """Draw top-1 against speed over dense; the front's points are numbered as in the table.

    Candidates that failed are left out, the chosen one is marked, and a line shows the goal.

    Raises:
        InputError: if the file cannot be written.
    """
    measured = [row for row in rows if row.error is None]
    dense = next(row for row in measured if row.method == "dense")
    figure, (panel,) = new_figure(1, width=10.0)
    draw_methods(panel, measured, lambda row: row.place)
    if chosen is not None:
        star = {"color": "gold", "mec": "black", "ms": 17, "zorder": 3}
        panel.plot(*chosen.place, "*", label="to be used", **star)
    line = {"color": "0.4", "ls": ":", "zorder": 0, "label": f"wanted: {goal}"}
    if goal is not None and goal.speedup is not None:
        panel.axvline(goal.speedup, **line)
    elif goal is not None and goal.drop is not None:
        panel.axhline(dense.place[1] - goal.drop, **line)
    best = front(measured)
    for number, row in enumerate(best, 1):
        panel.annotate(str(number), row.place, (0, 8), textcoords="offset points", ha="center")
    places, errors = (
        zip(*(row.place for row in best), strict=True),
        [row.drop_error for row in best],
    )
    panel.errorbar(*places, errors, fmt="none", ecolor="0.7", zorder=0)
    panel.margins(y=0.1)
    pictures, speed = len(dense.correct or ""), f"{dense.throughput:.0f} images/s"
    panel.set(
        title=f"{dense.model} at {dense.size}, {dense.dtype}, {pictures} pictures",
        xlabel=f"speed, x dense ({speed} at batch {dense.batch}{_on_devices(dense)})",
        ylabel="top-1 (%)",
    )
    panel.legend(loc="lower left", bbox_to_anchor=(1.01, 0.0), frameon=False)
    names = "\n".join(f"{number}  {row.name}" for number, row in enumerate(best, 1))
    text = f"Pareto front, top-1 ± its error against dense\n{names}"
    panel.annotate(text, (1.03, 1.0), xycoords="axes fraction", va="top", size=8)
    save_figure(figure, path)
