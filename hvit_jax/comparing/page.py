"""The report of a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from hvit_jax.comparing.config import CompareConfig
from hvit_jax.comparing.drawing import Picture, draw
from hvit_jax.comparing.opening import Opened
from hvit_jax.comparing.plots import plots
from hvit_jax.comparing.report import commands, conclusion, failures, machine, table, unsteady
from hvit_jax.comparing.rows import (
    Comparison,
    Goal,
    Trial,
    at_level,
    measured,
    show_change,
    show_score,
    verdict,
)
from hvit_jax.comparing.scores import CONFIDENCE, DRAWS, SCORES
from hvit_jax.data.source import even_places
from hvit_jax.fields import as_json, given
from hvit_jax.profiling.run import FAILURES
from hvit_jax.system.files import write_atomically
from hvit_jax.system.progress import show_progress

_OF_THE_RUN = ("workers", "output", "resume")  # Options that results do not depend on.
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
  color: #1b1f2a; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e3e6ec; }
th { border-bottom: 2px solid #9aa3b5; vertical-align: bottom; }
.name { text-align: left; } tr.use { background: #fff4c9; } tr.baseline td { color: #5b6475; }
.wide { overflow-x: auto; } .wide > * { min-width: 45rem; }
pre { background: #f3f5f9; padding: .7rem; overflow-x: auto; }
.said { border-left: 4px solid #d9a400; padding: .3rem 1rem; background: #fffaf0; }
.pictures { display: grid; gap: 6px 8px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
figure { margin: 0; } figcaption { font-size: 12px; color: #444; }
img { width: 100%; display: block; } svg { max-width: 100%; height: auto; }
.note { color: #5b6475; font-size: 13px; }
"""


def write_page(
    path: Path,
    done: Comparison,
    goal: Goal,
    config: CompareConfig,
    opened: Opened,
    messages: Console,
) -> None:
    """Write the report.

    Args:
        path: the file; replaced if it exists.
        done: what the comparison has come to.
        goal: what was wanted.
        config: what was asked for.
        opened: what was compared.
        messages: shows progress while pictures are drawn.

    Raises:
        InputError: if the file cannot be written.
    """
    dense = done.rows[0]
    title = f"{dense.model} at {dense.size}: methods compared on {done.pictures} pictures"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _conclusion(done, goal, config, opened),
        *(
            f'<h2>{escape(name)}</h2><div class="wide">{svg}</div>'
            for name, svg in plots(done.rows, done.chosen)
        ),
        _levels(done, config),
        _drawings(done, config, opened, messages),
        _all(done, opened),
        _measured(dense, opened),
        _about(config, opened),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    page = f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>'
    write_atomically(path, lambda file: file.write(f"{page}\n".encode()))


def _conclusion(done: Comparison, goal: Goal, config: CompareConfig, opened: Opened) -> str:
    said = "".join(f"<p>{escape(line)}</p>" for line in conclusion(done, goal))
    lines = [] if done.chosen is None else commands(done.chosen, config, opened.bench)
    shown = f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
    where, batch = machine(opened.about), done.rows[0].batch
    notes = [f"Speeds are those of {where}, at batch {batch} {opened.unit}."]
    shown += "".join(
        f'<p class="note">{escape(note)}</p>' for note in (*notes, *unsteady(done.rows))
    )
    return f'<div class="said">{said}</div>{shown}'


def _levels(done: Comparison, config: CompareConfig) -> str:
    """Write a table for every level of cost: the methods, the best first."""
    parts = []
    for level in sorted(config.levels, reverse=True):
        there = at_level(done.rows, level)
        if not there:
            continue
        first, unit = there[0].first, "x dense"
        head = [
            "method",
            "cost",
            SCORES[first].title,
            "against dense",
            unit,
            "beside the baselines",
        ]
        rows = [
            (
                _kind(row, done),
                [
                    row.name,
                    f"{row.cost:.2f}",
                    show_score(row, first),
                    show_change(row, first),
                    f"{row.speedup:.2f}",
                    verdict(row, there, done.rows),
                ],
            )
            for row in there
        ]
        parts.append(f"<h2>At {level:g} of the dense model's cost</h2>{_table(head, rows)}")
    return "".join(parts)


def _all(done: Comparison, opened: Opened) -> str:
    head, *lines = table(done.rows, opened.unit)
    ordered = sorted(measured(done.rows), key=lambda row: -row.cost)
    rows = [(_kind(row, done), list(line)) for row, line in zip(ordered, lines, strict=True)]
    others = "".join(f'<p class="note">{escape(line)}</p>' for line in failures(done))
    note = "Numbers on the left count the Pareto front of speed and score, from the fastest on."
    shown = _table(list(head), rows, names=2)
    return f'<h2>All settings</h2>{shown}<p class="note">{note}</p>{others}'


def _kind(row: Trial, done: Comparison) -> str:
    return "use" if row is done.chosen else "baseline" if row.is_baseline else ""


def _table(
    head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], *, names: int = 1
) -> str:
    """Write a table; rows come with their class, and the first columns are names."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="name"' if place < names else "" for place in range(len(cells))]
        return "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )

    body = "".join(f'<tr class="{kind}">{line(cells, "td")}</tr>' for kind, cells in rows)
    top = f"<thead><tr>{line(head, 'th')}</tr></thead>"
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _drawings(done: Comparison, config: CompareConfig, opened: Opened, messages: Console) -> str:
    """Show some pictures under every method at the middle level of cost."""
    level = sorted(config.levels)[len(config.levels) // 2]
    rows = [done.rows[0], *at_level(done.rows, level)]
    places = even_places(config.drawn, len(opened.pictures))
    if not places or len(rows) == 1:
        return ""
    columns = [("the picture", draw(opened.bench, places, None))]
    with show_progress(messages, len(rows), unit="methods drawn") as show:
        for number, row in enumerate(rows, 1):
            with contextlib.suppress(*FAILURES):  # Then it is left out, as its numbers say why.
                drawn = draw(opened.bench, places, row.setting(opened.bench.sizes))
                columns.append((f"{row.method}, {row.cost:.2f}", drawn))
            show(number, row.name)
    parts = []
    for number, place in enumerate(places):
        figures = "".join(
            f"<figure>{_image(drawn[number])}<figcaption>{escape(name)}</figcaption></figure>"
            for name, drawn in columns
        )
        name = escape(opened.pictures[place])
        parts.append(f'<p class="note">{name}</p><div class="pictures">{figures}</div>')
    what = (
        "The map over the picture."
        if opened.unit == "windows"
        else "Patches that the last block treats as one have their mean colour and an outline; "
        "dropped ones are dark."
    )
    title = f"Pictures at {level:g} of the dense model's cost"
    return f'<h2>{title}</h2><p class="note">{what}</p>{"".join(parts)}'


def _image(picture: Picture) -> str:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=82)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'


def _measured(dense: Trial, opened: Opened) -> str:
    """Say what the scores are, and how intervals and speeds were made."""
    scores = "".join(
        f"<li>{escape(SCORES[name].title)}: {escape(SCORES[name].about)}</li>"
        for name in dense.scores
    )
    text = (
        f"Intervals are those of the percentile bootstrap: the middle {CONFIDENCE:.0%} of the "
        f"scores of {DRAWS} draws of as many pictures, with replacement. Draws are the same for "
        "all settings, and differences are taken draw by draw. Cost is in multiply-adds of one "
        f"{opened.unit.removesuffix('s')}, against the dense model's. Speed is the median of five "
        "rounds in turns with the dense model. What a lower resolution reaches at the cost of a "
        "method is taken to be linear between the two measured beside it; weights were not trained "
        "at any lower one."
    )
    return f"<h2>How it was measured</h2><ul>{scores}</ul><p>{escape(text)}</p>"


def _about(config: CompareConfig, opened: Opened) -> str:
    """List the options that were given, and all that results follow from."""
    options = {
        name: as_json(value) for name, value in given(config).items() if name not in _OF_THE_RUN
    }
    shown: dict[str, Any] = {"options": options, **opened.about}
    text = escape(json.dumps(shown, indent=1))
    return f"<h2>Options, versions, fingerprints</h2><pre>{text}</pre>"
