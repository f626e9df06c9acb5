"""Accuracy against throughput, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.plotting import draw_methods, new_figure, save_figure


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
    figure, panels = new_figure(len(models))
    for panel, model in zip(panels, models, strict=True):
        draw_methods(panel, [row for row in points if row["model"] == model], _place)
        panel.legend()
        panel.set(title=model, xlabel="images/s, measured", ylabel="top-1 (%), published")
    save_figure(figure, path)


def _place(row: dict[str, Any]) -> tuple[float, float]:
    return row["throughput"], row["published"]["top1"]
