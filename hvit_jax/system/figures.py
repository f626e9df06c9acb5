"""Figures: matplotlib where it is installed, and files that appear whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvit_jax.errors import import_optional
from hvit_jax.system.files import check_destination, write_atomically

FORMATS = (".png", ".jpg", ".jpeg", ".svg", ".pdf")


def check_plot(path: Path, flag: str) -> None:
    """Refuse a plot that cannot be made, before anything is computed for it.

    Args:
        path: the file to write; replaced if it exists.
        flag: the option that names it, for the error.
    """
    check_destination(path, overwrite=True)
    import_optional("matplotlib", f"{flag} needs matplotlib: pip install 'hvit-jax[plot]'")


def pyplot() -> Any:
    """Import matplotlib's pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def new_figure(panels: int, *, width: float = 6.0) -> tuple[Any, Any]:
    """Make a figure with panels side by side, each of a width in inches."""
    size = (width * panels, 4.5)
    figure, axes = pyplot().subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    return figure, axes[0]


def save_figure(figure: Any, path: Path, *, dpi: int = 150) -> None:
    """Write a figure and free it."""
    options = {"format": path.suffix[1:].lower(), "dpi": dpi, "bbox_inches": "tight"}
    write_atomically(path, lambda file: figure.savefig(file, **options))
    pyplot().close(figure)
