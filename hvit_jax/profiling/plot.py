"""Accuracy against throughput, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.plotting import pyplot, save_figure


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw published top-1 against measured throughput, one panel a model.

    Args:
        rows: a report's rows; those without either figure are left out.
        path: the file to write, replaced if it exists.

    Raises:
        InputError: if no row has both figures, or the file cannot be written.
    """
    points = [row for row in rows if row["throughput"] and (row["published"] or {}).get("top1")]
    if not points:
        raise InputError(f"{path} would be empty: no row has a throughput and a published top-1")
    models = list(dict.fromkeys(row["model"] for row in points))
    figure, panels = pyplot().subplots(
        1, len(models), figsize=(6 * len(models), 4.5), squeeze=False, layout="constrained"
    )
    for panel, model in zip(panels[0], models, strict=True):
        _draw(panel, [row for row in points if row["model"] == model])
        panel.set(title=model, xlabel="images/s, measured", ylabel="top-1 (%), published")
    save_figure(figure, path)


def _draw(panel: Any, rows: list[dict[str, Any]]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        xs, ys = zip(*[_place(row) for row in rows if row["method"] == method], strict=True)
        panel.plot(xs, ys, "o", label=method)
    front = pareto_front([_place(row) for row in rows])
    panel.plot(*zip(*front, strict=True), "-", color="0.6", zorder=0, label="Pareto front")
    panel.legend()
    panel.grid(alpha=0.3)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Find the points that no other beats in both coordinates, from the fastest on."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return row["throughput"], row["published"]["top1"]
