"""What an evaluation shows while it runs, prints at its end, writes, and reads again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.evaluation.tally import Rows, Tally, Totals, join_rows
from hvit_jax.fields import matches
from hvit_jax.models.vit import ViT
from hvit_jax.published import describe_configuration, find_published
from hvit_jax.reducers import method_name
from hvit_jax.system.files import read_json, write_atomically
from hvit_jax.system.progress import print_table

_TABLE = (
    ("top-1 (%)", "top1", "{:.2f}"),
    ("top-5 (%)", "top5", "{:.2f}"),
    ("loss", "loss", "{:.4f}"),
    ("images", "images", "{:d}"),
    ("images/s", "images_per_second", "{:.1f}"),
    ("waiting for pictures", "input_wait", "{:.1%}"),
    ("GFLOPs (tables' convention)", "gflops", "{:.3f}"),
)
_SKIPPED_SHOWN = 10
# What results hold, as far as it is read here.
_KINDS = {"method": str, "args": dict, "config": dict}
_KINDS |= {"top1": float | None, "top5": float | None, "loss": float | None}


def describe(results: dict[str, Any]) -> str:
    """Name a configuration in a few words; the scores are not needed."""
    shape = "x".join(map(str, results["resolution"]))
    method = method_name(results["method"], results["args"])
    count = results.get("devices", 1)
    devices = f"{count} x {results['device']}" if count > 1 else results["device"]
    by = f", classified by {results['classified_by']}" if "classified_by" in results else ""
    return f"{method}, {results['model']} at {shape}, {results['dtype']}, {devices}{by}"


def describe_model(model: ViT) -> dict[str, Any]:
    """Name a model as results do: method, options and sizes, cost, and the published row."""
    return {
        **describe_configuration(model.config, model.reducer),
        "dtype": model.compute.dtype,
        "gflops": count_flops(model.config, model.reducer) / 1e9,
        "published": find_published(model.config, model.reducer),
    }


def scores(tally: Tally) -> dict[str, Any]:
    """Give the scores as --output writes them: accuracies in per cent; None for what is missing."""
    totals = tally.totals
    return {
        "top1": totals.percent(totals.correct),
        "top5": totals.percent(totals.correct_top5),
        "loss": totals.mean(totals.loss),
        "images": totals.images,
        "images_per_second": totals.images_per_second,
        "input_wait": totals.input_wait,
        "not_finite": totals.not_finite,
        "skipped": tally.skipped,
        "report": totals.report,
    }


def write_predictions(
    path: Path, tally: Tally, paths: Sequence[str], classes: Sequence[str]
) -> None:
    """Write the scored pictures' `paths`, `labels`, `logits` and `top1`, in the source's order.

    `classes` are the names of the logits' columns.

    Args:
        path: the file to write.
        tally: what was scored, with logits.
        paths: names of all pictures.
        classes: names of the outputs.
    """
    # Rows without pictures give shapes and types where nothing was scored.
    none = np.zeros(0, np.int32)
    empty = Rows(none, none, none, np.zeros((0, len(classes)), np.float32), (), Totals())
    rows = join_rows(tally.rows or [empty])
    names = np.array([paths[index] for index in rows.indices], np.str_)
    arrays = {"labels": rows.labels, "logits": rows.logits, "top1": rows.top1}
    arrays["classes"] = np.array(classes, np.str_)
    write_atomically(path, lambda file: np.savez(file, paths=names, **arrays))


def read_results(path: Path) -> dict[str, Any]:
    """Read what `--output` wrote.

    Raises:
        InputError: if it cannot be read, or is not the result of a whole evaluation.
    """
    recorded = read_json(path)
    if not _KINDS.keys() <= recorded.keys():
        raise InputError(f"{path} holds no results, as hvit eval --output writes them")
    wrong = [name for name, kind in _KINDS.items() if not matches(recorded[name], kind)]
    if wrong:
        raise InputError(f"{path} has a {wrong[0]} that hvit eval --output does not write")
    if recorded.get("partial") or recorded["top1"] is None:
        raise InputError(f"{path} comes from an evaluation that did not finish")
    return recorded


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print the final table, beside the published row if the configuration is one."""
    published = (results["published"] or {}).get("published", {})
    head, rows = ["", "partial" if results["partial"] else "measured"], []
    for label, name, form in _TABLE:
        there = "throughput" if name == "images_per_second" else name
        rows.append([label, _show(results.get(name), form), _show(published.get(there), "{}")])
    rows += [[name.replace("_", " "), f"{x:g}", ""] for name, x in results["report"].items()]
    if published:
        head.append("published (V100, float32)")
    console.print(describe(results), soft_wrap=True)
    print_table(console, head, [row[: len(head)] for row in rows])
    print_skipped(console, results["skipped"])
    if broken := results["not_finite"]:
        text = f"{broken} pictures gave logits that are not finite numbers; they count as wrong"
        console.print(text, soft_wrap=True)


def _show(value: Any, form: str) -> str:
    if value is None:
        return ""
    text = form.format(value)
    return text if value == 0 or "%" in text or float(text) else f"{value:.2g}"


def print_skipped(console: Console, skipped: Sequence[str]) -> None:
    """Say which pictures could not be read, if any; not all of many."""
    if skipped:
        console.print(f"{len(skipped)} unreadable pictures were left out:")
        for problem in skipped[:_SKIPPED_SHOWN]:
            console.print(f"  {problem}", soft_wrap=True)
        if len(skipped) > _SKIPPED_SHOWN:
            console.print(f"  and {len(skipped) - _SKIPPED_SHOWN} more; --output lists all")


def running_scores(tally: Tally) -> str:
    """Put the running results in a few words."""
    totals = tally.totals
    if not totals.images:
        return "nothing scored yet"
    top1, top5 = totals.percent(totals.correct), totals.percent(totals.correct_top5)
    return f"top-1 {top1:.2f} top-5 {top5:.2f} {totals.images_per_second:.1f} images/s"
