"""What a sweep shows: the front as a table and a picture, and the setting to use as commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvit_jax.evaluation import EvalConfig
from hvit_jax.fields import given
from hvit_jax.profiling.plot import draw_methods
from hvit_jax.reducers import make_reducer
from hvit_jax.sweeping.choice import Goal, Trial, front, place
from hvit_jax.sweeping.config import SweepConfig
from hvit_jax.system.figures import new_figure, save_figure


def front_table(rows: Sequence[Trial], chosen: Trial | None) -> str:
    """Write the front as a Markdown table, with what is uncertain about it.

    Args:
        rows: the front's.
        chosen: the setting to use, which is marked.
    """
    on = _on_devices(rows[0])
    lines = [
        f"| | method | GFLOPs | top-1 (%) | against dense | images/s{on} | x dense | rounds |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for number, row in enumerate(rows, 1):
        mark = " **use**" if row is chosen else ""
        low, high = row.speedup_range or (0.0, 0.0)
        lines.append(
            f"| {number} | {row.name}{mark} | {row.gflops:.3f} | {row.top1:.1f} | "
            f"{change(row)} | {row.throughput:.1f} | {row.speedup:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _on_devices(row: Trial) -> str:
    return f" on {row.devices} devices" if row.devices > 1 else ""


def change(row: Trial) -> str:
    """Tell what accuracy a candidate gains or loses against dense, and the standard error."""
    if row.method == "dense":
        return ""
    return f"{0.0 - (row.drop or 0.0):+.1f} ± {row.drop_error:.1f}"


def summary(row: Trial) -> str:
    """Put a setting in a few words."""
    speed = f"{row.speedup:.2f} x dense{_on_devices(row)}"
    return f"{row.name}: top-1 {change(row)} against dense, {speed}"


def commands(row: Trial, config: SweepConfig) -> tuple[str, str]:
    """Write a setting as a command that evaluates it on all pictures, and as Python.

    Args:
        row: the setting.
        config: the sweep's, under which it is to run too.
    """
    reducer = make_reducer(row.method, **row.args)
    evaluation = EvalConfig(
        data=config.data,
        checkpoint=config.checkpoint,
        reducer=reducer,
        resolution=config.resolution,
        compute=config.compute,
        batch_size=config.batch_size,
    )
    folder = "hvit_jax.demo.checkpoint_dir()"
    if config.checkpoint is not None:
        folder = repr(str(config.checkpoint))
    size = {} if config.resolution is None else {"resolution": config.resolution}
    options = {**given(reducer), **size, **given(config.compute)}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    command = shlex.join(["python", "eval.py", *evaluation.words()])
    return command, f"hvit_jax.load({folder}, {reducer.name!r}{arguments})"


def plot_sweep(rows: Sequence[Trial], chosen: Trial | None, goal: Goal | None, path: Path) -> None:
    """Draw top-1 against speed over dense; the front's points are numbered as in the table.

    Args:
        rows: of all candidates; those that failed are left out.
        chosen: the setting to use, which is marked.
        goal: what was wanted; a line shows it.
        path: the file to write, replaced if it exists.

    Raises:
        InputError: if the file cannot be written.
    """
    measured = [row for row in rows if row.error is None]
    dense = next(row for row in measured if row.method == "dense")
    figure, (panel,) = new_figure(1, width=10.0)
    draw_methods(panel, measured, place)
    if chosen is not None:
        panel.plot(
            *place(chosen), "*", color="gold", mec="black", ms=17, zorder=3, label="to be used"
        )
    _draw_goal(panel, goal, dense)
    best = front(measured)
    for number, row in enumerate(best, 1):
        panel.annotate(str(number), place(row), (0, 8), textcoords="offset points", ha="center")
    errors = [row.drop_error for row in best]
    panel.errorbar(*zip(*map(place, best), strict=True), errors, fmt="none", ecolor="0.7", zorder=0)
    panel.margins(y=0.1)
    pictures, speed = len(dense.correct or ""), f"{dense.throughput:.0f} images/s"
    panel.set(
        title=f"{dense.model} at {dense.size}, {dense.dtype}, {pictures} pictures",
        xlabel=f"speed, x dense ({speed} at batch {dense.batch}{_on_devices(dense)})",
        ylabel="top-1 (%)",
    )
    panel.legend(loc="lower left", bbox_to_anchor=(1.01, 0.0), frameon=False)
    names = "\n".join(f"{number}  {row.name}" for number, row in enumerate(best, 1))
    panel.annotate(
        f"Pareto front, top-1 ± its error against dense\n{names}",
        (1.03, 1.0),
        xycoords="axes fraction",
        va="top",
        size=8,
    )
    save_figure(figure, path)


def _draw_goal(panel: Any, goal: Goal | None, dense: Trial) -> None:
    if goal is None:
        return
    line = {"color": "0.4", "ls": ":", "zorder": 0}
    if goal.speedup is not None:
        panel.axvline(goal.speedup, label=f"wanted: {goal}", **line)
    elif goal.drop is not None:
        panel.axhline(place(dense)[1] - goal.drop, label=f"wanted: {goal}", **line)
