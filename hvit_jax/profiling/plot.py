"""Accuracy against throughput, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.system.plotting import draw_methods, new_figure, save_figure

Row = dict[str, Any]


def plot(rows: Sequence[Row], path: Path, top1: Callable[[Row], float | None], kind: str) -> None:
    """Draw top-1 against measured throughput, one panel a model.

    Args:
        rows: a report's rows; those without either figure are left out.
        path: the file to write, replaced if it exists.
        top1: finds a row's accuracy, in per cent.
        kind: of accuracy: "published" or "measured".

    Raises:
        InputError: if no row has both figures, or the file cannot be written.
    """
    points = [row for row in rows if row["throughput"] and top1(row) is not None]
    if not points:
        raise InputError(f"{path} would be empty: no row has a throughput and a {kind} top-1")
    models = list(dict.fromkeys(row["model"] for row in points))
    figure, panels = new_figure(len(models))
    for panel, model in zip(panels, models, strict=True):
        here = [row for row in points if row["model"] == model]
        draw_methods(panel, here, lambda row: (row["throughput"], top1(row) or 0.0))
        panel.legend()
        panel.set(title=model, xlabel="images/s, measured", ylabel=f"top-1 (%), {kind}")
    save_figure(figure, path)
