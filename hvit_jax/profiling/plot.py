"""Accuracy against throughput, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.evaluation.files import check_destination, write_atomically

_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Check that a plot can be made, before anything is measured for it.

    Raises:
        InputError: if matplotlib is missing, the format is unknown, or the file cannot be written.
    """
    if path.suffix not in _FORMATS:
        raise InputError(f"--plot takes one of {', '.join(_FORMATS)}, got {path}")
    check_destination(path, overwrite=True)
    _pyplot()


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


def new_figure(panels: int, *, width: float = 6.0) -> tuple[Any, Any]:
    """Make a figure with panels side by side.

    Args:
        panels: how many.
        width: of each, in inches.
    """
    size = (width * panels, 4.5)
    figure, axes = _pyplot().subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that its file's name tells, and close it.

    Raises:
        InputError: if it cannot be written.
    """
    write_atomically(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=150))
    _pyplot().close(figure)


def draw_methods(
    panel: Any,
    rows: Sequence[dict[str, Any]],
    place: Callable[[dict[str, Any]], tuple[float, float]],
) -> None:
    """Draw rows as points, a colour for each method, and their Pareto front as a line.

    Args:
        panel: matplotlib axes.
        rows: what to draw.
        place: tells a row's place, both of whose coordinates are the better the larger.
    """
    for method in dict.fromkeys(row["method"] for row in rows):
        xs, ys = zip(*[place(row) for row in rows if row["method"] == method], strict=True)
        panel.plot(xs, ys, "o", label=method)
    front = pareto_front([place(row) for row in rows])
    panel.plot(*zip(*front, strict=True), "-", color="0.6", zorder=0, label="Pareto front")
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


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("--plot needs matplotlib: pip install 'hvit-jax[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
