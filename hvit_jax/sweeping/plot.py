"""The sweep as a picture: accuracy against speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvit_jax.profiling.report import method_name
from hvit_jax.sweeping.choice import Goal, front, place
from hvit_jax.system.figures import draw_methods, new_figure, save_figure

Row = dict[str, Any]


def plot_sweep(rows: Sequence[Row], chosen: Row | None, goal: Goal | None, path: Path) -> None:
    """Draw top-1 against speed over dense; the front's points are numbered as in the table.

    Args:
        rows: of all candidates; those that failed are left out.
        chosen: the setting to use, which is marked.
        goal: what was wanted; a line shows it.
        path: the file to write, replaced if it exists.

    Raises:
        InputError: if the file cannot be written.
    """
    measured = [row for row in rows if row["error"] is None]
    dense = next(row for row in measured if row["method"] == "dense")
    figure, panels = new_figure(1, width=10.0)
    panel = panels[0]
    draw_methods(panel, measured, place)
    if chosen is not None:
        panel.plot(
            *place(chosen), "*", color="gold", mec="black", ms=17, zorder=3, label="to be used"
        )
    _draw_goal(panel, goal, dense)
    best = front(measured)
    for number, row in enumerate(best, 1):
        panel.annotate(str(number), place(row), (0, 8), textcoords="offset points", ha="center")
    errors = [row["drop_error"] for row in best]
    panel.errorbar(*zip(*map(place, best), strict=True), errors, fmt="none", ecolor="0.7", zorder=0)
    key = [f"{number}  {method_name(row)}" for number, row in enumerate(best, 1)]
    panel.margins(y=0.1)
    size, on = row_size(dense), f" on {dense['devices']} devices" if dense["devices"] > 1 else ""
    panel.set(
        title=f"{dense['model']} at {size}, {dense['dtype']}, {len(dense['correct'])} pictures",
        xlabel=f"speed, x dense ({dense['throughput']:.0f} images/s at batch {dense['batch']}{on})",
        ylabel="top-1 (%)",
    )
    panel.legend(loc="lower left", bbox_to_anchor=(1.01, 0.0), frameon=False)
    panel.annotate(
        "Pareto front, top-1 ± its error against dense\n" + "\n".join(key),
        (1.03, 1.0),
        xycoords="axes fraction",
        va="top",
        size=8,
    )
    save_figure(figure, path)


def row_size(row: Row) -> str:
    """Write a row's resolution as height x width."""
    size = row["resolution"]
    return "x".join(map(str, size if isinstance(size, list) else [size, size]))


def _draw_goal(panel: Any, goal: Goal | None, dense: Row) -> None:
    if goal is None:
        return
    line = {"color": "0.4", "ls": ":", "zorder": 0}
    if goal.speedup is not None:
        panel.axvline(goal.speedup, label=f"wanted: {goal}", **line)
    elif goal.drop is not None:
        panel.axhline(dense["top1"] - goal.drop, label=f"wanted: {goal}", **line)
