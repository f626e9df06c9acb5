"""What a run over a data set prints, writes, and reads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.dense.metrics import Metric
from hvit_jax.dense.tally import MapTally
from hvit_jax.errors import InputError
from hvit_jax.evaluation.results import describe, print_skipped
from hvit_jax.evaluation.verify import LOSS, POINTS, Limits
from hvit_jax.fields import matches
from hvit_jax.system.files import read_json
from hvit_jax.system.progress import print_table

# What --verify compares; see `evaluation.verify.Limits`.
LIMITS: dict[str, Limits] = {
    "segmentation": (
        ("miou", "{:.2f}", POINTS, 0.0),
        ("macc", "{:.2f}", POINTS, 0.0),
        ("aacc", "{:.2f}", POINTS, 0.0),
    ),
    "depth": (
        ("rmse", "{:.4f}", 0.0, LOSS),
        ("abs_rel", "{:.4f}", 0.0, LOSS),
        ("delta1", "{:.4f}", LOSS, 0.0),
    ),
}
MOVED = {"segmentation": "mIoU within {:.2f} points", "depth": "RMSE within {:.4f} m"}
_NAMES = {"miou": "mIoU (%)", "macc": "mAcc (%)", "aacc": "aAcc (%)"}
_NAMES |= {"rmse": "RMSE (m)", "abs_rel": "AbsRel", "delta1": "delta1"}
_SPEED = (
    ("images", "images", "{:d}"),
    ("window_count", "windows", "{:d}"),
    ("images_per_second", "images/s", "{:.2f}"),
    ("windows_per_second", "windows/s", "{:.2f}"),
    ("input_wait", "waiting for pictures", "{:.1%}"),
    ("gflops", "GFLOPs of a window", "{:.3f}"),
)
_CLASSES_SHOWN = 60
_KINDS = {"task": str, "method": str, "args": dict, "config": dict, "images": int}


def scores(tally: MapTally, metric: Metric) -> dict[str, Any]:
    """Give the scores as --output writes them; None for what is missing."""
    totals = tally.totals
    return {
        **metric.scores(tally.measured, totals.images),
        "images": totals.images,
        "window_count": totals.windows,
        "images_per_second": totals.per_second(totals.images),
        "windows_per_second": totals.per_second(totals.windows),
        "input_wait": totals.input_wait,
        "not_finite": totals.not_finite,
        "skipped": tally.skipped,
    }


def running_scores(tally: MapTally, metric: Metric) -> str:
    """Put the running results in a few words."""
    totals = tally.totals
    if not totals.images:
        return "nothing mapped yet"
    speed = f"{totals.per_second(totals.windows) or 0:.1f} windows/s"
    return f"{metric.running(tally.measured, totals.images)} {speed}".strip()


def read_results(path: Path) -> dict[str, Any]:
    """Read what `--output` wrote.

    Raises:
        InputError: if it cannot be read, or is not the result of a whole run.
    """
    recorded = read_json(path)
    known = all(matches(recorded.get(name), kind) for name, kind in _KINDS.items())
    if not known or recorded["task"] not in LIMITS:
        raise InputError(
            f"{path} holds no results, as hvit segment --output and hvit depth --output write them"
        )
    wrong = [
        name
        for name, *_ in LIMITS[recorded["task"]]
        if not matches(recorded.get(name), float | None)
    ]
    if wrong:
        raise InputError(f"{path} has a {wrong[0]} that no command writes")
    if recorded.get("partial"):
        raise InputError(f"{path} comes from a run that did not finish")
    return recorded


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print the final tables: scores and speed, the dense model's beside them, and classes."""
    columns = {"partial" if results["partial"] else "measured": results}
    if results.get("dense"):
        columns["dense"] = results["dense"]
    if results.get("published"):
        columns["published"] = {"miou": results["published"]["published"]["miou"]}
    shown = [(name, _NAMES[name], form) for name, form, *_ in LIMITS[results["task"]]]
    rows = [
        [label, *(_show(each.get(name), form) for each in columns.values())]
        for name, label, form in (*shown, *_SPEED)
    ]
    console.print(describe(results), soft_wrap=True)
    print_table(console, ["", *columns], rows)
    _print_classes(console, results.get("classes", []))
    print_skipped(console, results["skipped"])
    if broken := results["not_finite"]:
        console.print(f"the model's numbers are not all finite for {broken} pictures")


def _print_classes(console: Console, classes: list[dict[str, Any]]) -> None:
    seen = [each for each in classes if each["iou"] is not None]
    if not seen:
        return
    rows = [
        [each["name"], _show(each["iou"], "{:.2f}"), _show(each["acc"], "{:.2f}")]
        for each in seen[:_CLASSES_SHOWN]
    ]
    print_table(console, ["class", "IoU (%)", "Acc (%)"], rows)
    if len(seen) > _CLASSES_SHOWN:
        console.print(f"and {len(seen) - _CLASSES_SHOWN} more classes; --output lists all")


def _show(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)
