"""Figures: a row for every picture, a column for every view of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from hvit_jax.system.plotting import pyplot, save_figure

INCHES = 2.4
TITLE_INCHES = 0.6
LINE_INCHES = 0.18


@dataclass(frozen=True)
class Panel:
    """One drawing in a figure.

    Attributes:
        title: lines above it, shown in the first row only.
        drawing: pixels.
    """

    title: str
    drawing: UInt8[np.ndarray, "h w 3"]


def draw_figure(rows: Sequence[Sequence[Panel]], path: Path, *, title: str) -> None:
    """Draw panels to a file.

    Args:
        rows: equally long rows of panels.
        path: the file, replaced if it exists.
        title: above everything.

    Raises:
        InputError: if the file cannot be written.
    """
    height, width = rows[0][0].drawing.shape[:2]
    lines = max(panel.title.count("\n") + 1 for panel in rows[0])
    across, down = INCHES * len(rows[0]), INCHES * height / width * len(rows)
    size = across, down + TITLE_INCHES + LINE_INCHES * lines
    figure, axes = pyplot().subplots(
        len(rows), len(rows[0]), figsize=size, squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    figure.suptitle(title, fontsize=11)
    for index, (places, panels) in enumerate(zip(axes, rows, strict=True)):
        for place, panel in zip(places, panels, strict=True):
            place.axis("off")
            place.imshow(panel.drawing, interpolation="antialiased")
            if index == 0:
                place.set_title(panel.title, fontsize=9)
    save_figure(figure, path, dpi=130)
