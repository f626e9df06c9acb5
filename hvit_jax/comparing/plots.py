"""Plots of a report, as SVG that a page holds."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from hvit_jax.comparing.rows import Trial, front, measured
from hvit_jax.comparing.scores import SCORES
from hvit_jax.system.figures import new_figure, pyplot

_MARKERS = "osD^vP"
_TEXT = {"svg.fonttype": "none", "svg.hashsalt": "hvit_jax", "font.size": 9}


def plots(rows: Sequence[Trial], chosen: Trial | None) -> list[tuple[str, str]]:
    """Draw what settings lose against their speed and their cost.

    Args:
        rows: of the comparison, the dense model first.
        chosen: the setting to use; a star marks it.

    Returns:
        A title and the SVG of each.
    """
    good = [row for row in measured(rows) if row.method != "dense"]
    if not good:
        return []
    title = SCORES[rows[0].first].title
    return [
        (f"{title} against dense, and speed", _by_speed(good, rows[0], chosen)),
        (f"{title} against dense, and cost", _by_cost(good)),
    ]


def _styles(rows: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Give each method a colour and a marker, and baselines grey."""
    names = list(dict.fromkeys(row.method for row in rows if not row.is_baseline))
    baselines = list(dict.fromkeys(row.method for row in rows if row.is_baseline))
    colours = pyplot().get_cmap("tab20")
    return {
        name: {"color": colours(2 * place % 20 + place // 10), "marker": _MARKERS[place % 6]}
        for place, name in enumerate(names)
    } | {
        name: {"color": str(0.15 + 0.2 * place), "marker": "x*+"[place % 3], "ls": "--"}
        for place, name in enumerate(baselines)
    }


def _by_speed(rows: Sequence[Trial], dense: Trial, chosen: Trial | None) -> str:
    with pyplot().rc_context(_TEXT):
        figure, panel = _panel(rows[0], "speed, x dense")
        for method, style in _styles(rows).items():
            here = [row for row in rows if row.method == method]
            places = [(row.speedup, _change(row)) for row in here]
            style = {**style, "ls": "none", "label": method}
            panel.errorbar(*zip(*places, strict=True), yerr=_errors(here), lw=0.6, ms=5, **style)
        panel.plot(1, 0, "s", color="black", label="dense", zorder=3)
        line = [(row.speedup, _change(row)) for row in front([dense, *rows])]
        panel.plot(*zip(*line, strict=True), "-", color="0.7", zorder=0, label="Pareto front")
        if chosen is not None and chosen.method != "dense":
            star = {"color": "gold", "mec": "black", "ms": 15, "zorder": 4, "label": "to use"}
            panel.plot(chosen.speedup, _change(chosen), "*", **star)
        return _svg(figure, panel, "speed")


def _by_cost(rows: Sequence[Trial]) -> str:
    with pyplot().rc_context(_TEXT):
        figure, panel = _panel(rows[0], "multiply-adds, x dense")
        for method, style in _styles(rows).items():
            here = sorted((row for row in rows if row.method == method), key=lambda row: row.cost)
            places = [(row.cost, _change(row)) for row in here]
            style = {"ls": "-", **style, "label": method}
            panel.plot(*zip(*places, strict=True), ms=5, lw=1, **style)
        panel.invert_xaxis()
        return _svg(figure, panel, "cost")


def _change(row: Trial) -> float:
    return row.scores[row.first]["change"]


def _errors(rows: Sequence[Trial]) -> list[list[float]]:
    """Give how far the intervals reach below and above."""
    ends = [row.scores[row.first]["change_interval"] for row in rows]
    below = [max(0.0, _change(row) - low) for row, (low, _) in zip(rows, ends, strict=True)]
    above = [max(0.0, high - _change(row)) for row, (_, high) in zip(rows, ends, strict=True)]
    return [below, above]


def _panel(row: Trial, across: str) -> tuple[Any, Any]:
    figure, (panel,) = new_figure(1, width=9.0)
    panel.axhline(0, color="0.5", lw=0.8, zorder=0)
    panel.grid(alpha=0.25)
    score = SCORES[row.first]
    panel.set(xlabel=across, ylabel=f"{score.title}, change against dense")
    if score.better < 0:
        panel.invert_yaxis()
    return figure, panel


def _svg(figure: Any, panel: Any, name: str) -> str:
    panel.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot().close(figure)
    whole = text.getvalue()
    # The parts of two plots on one page must not have the same names.
    return re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", whole[whole.index("<svg") :])
