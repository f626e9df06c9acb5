"""Repeating an evaluation and comparing: `hvit eval --verify results.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.fields import from_json
from hvit_jax.reducers import make_reducer
from hvit_jax.system.provenance import FINGERPRINTS, changes

# Other devices and versions round otherwise, and pictures between two classes change sides.
POINTS, LOSS = 0.1, 1e-3
_SAME = (*FINGERPRINTS, "images", "not_finite", "skipped")
# Of each score its name, how it is written, and how far it may move: as it is, or of its value.
Limits = Sequence[tuple[str, str, float, float]]
SCORES: Limits = (
    ("top1", "{:.2f}", POINTS, 0.0),
    ("top5", "{:.2f}", POINTS, 0.0),
    ("loss", "{:.6f}", 0.0, LOSS),
)
_FREE = ("device", "devices", "matmul_precision", "versions")
# What does not come from the file: where the new evaluation writes.
_NOT_REPEATED = ("workers", "output", "predictions", "verify", "overwrite", "resume", "processes")
_NOT_REPEATED += ("save_maps",)


def repeated(
    path: Path,
    recorded: dict[str, Any],
    record: type[Any] = EvalConfig,
    program: str = "hvit eval",
) -> Any:
    """Make the record of a run from its results.

    Args:
        path: the file that holds them.
        recorded: its content.
        record: the record's class.
        program: the command that wrote it.

    Raises:
        InputError: if they hold options that no evaluation has.
    """
    content = {
        name: value for name, value in recorded["config"].items() if name not in _NOT_REPEATED
    }
    try:
        reducer = make_reducer(recorded["method"], **recorded["args"])
        return from_json(record, content, reducer=reducer, verify=path)
    except InputError as error:
        raise InputError(
            f"{path} has options that {program} --output does not write: {error}"
        ) from error


def differences(
    recorded: dict[str, Any], results: dict[str, Any], limits: Limits = SCORES
) -> list[str]:
    """Say what differs between two results by more than rounding can explain."""
    found = [
        f"{name} was {recorded[name]} and is {results[name]}"
        for name in _SAME
        if recorded.get(name) is not None and recorded[name] != results[name]
    ]
    for name, form, points, share in limits:
        before, now = recorded[name], results[name]
        if before is None:
            continue
        if now is None or not abs(now - before) <= points + 1e-9 + share * abs(before):
            shown = "none" if now is None else form.format(now)
            found.append(f"{name} was {form.format(before)} and is {shown}")
    return found


def print_changes(console: Console, recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Print which of the things that results may differ in have changed: devices and versions."""
    before, after = ({name: about.get(name) for name in _FREE} for about in (recorded, now))
    for change in changes(before, after):
        console.print(f"recorded {change}")


def print_verification(
    console: Console,
    recorded: dict[str, Any],
    results: dict[str, Any],
    limits: Limits = SCORES,
    moved: str = "top-1 within {:.2f} points",
) -> bool:
    """Print whether the recorded results hold, and return it.

    Args:
        console: where to.
        recorded: the results that were.
        results: those that are.
        limits: of their scores.
        moved: says how far the first of these moved.
    """
    print_changes(console, recorded, results)
    found = differences(recorded, results, limits)
    for line in found:
        console.print(f"differs: {line}")
    if not found:
        text = moved.format(abs(results[limits[0][0]] - recorded[limits[0][0]]))
        console.print(f"verified: {text} on {results['images']} images")
    return not found
