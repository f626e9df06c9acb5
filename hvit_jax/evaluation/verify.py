"""Repeating an evaluation and comparing: `hvit eval --verify results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.fields import from_json
from hvit_jax.reducers import make_reducer
from hvit_jax.system.provenance import changes

# Other devices and versions round otherwise, and pictures between two classes change sides.
POINTS, LOSS = 0.1, 1e-3
_SAME = (
    "data_sha256",
    "checkpoint_sha256",
    "labels_sha256",
    "train_data_sha256",
    "text_embeddings_sha256",
    "images",
    "not_finite",
    "skipped",
)
_FREE = ("device", "devices", "matmul_precision", "versions")
# What does not come from the file: where the new evaluation writes.
_NOT_REPEATED = ("workers", "output", "predictions", "verify", "overwrite", "resume", "processes")


def repeated(path: Path, recorded: dict[str, Any]) -> EvalConfig:
    """Make the record of an evaluation from its results, which the file `path` holds.

    Raises:
        InputError: if they hold options that no evaluation has.
    """
    content = {
        name: value for name, value in recorded["config"].items() if name not in _NOT_REPEATED
    }
    try:
        reducer = make_reducer(recorded["method"], **recorded["args"])
        return from_json(EvalConfig, content, reducer=reducer, verify=path)
    except InputError as error:
        raise InputError(
            f"{path} has options that hvit eval --output does not write: {error}"
        ) from error


def differences(recorded: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Say what differs between two results by more than rounding can explain."""
    found = [
        f"{name} was {recorded[name]} and is {results[name]}"
        for name in _SAME
        if recorded.get(name) is not None and recorded[name] != results[name]
    ]
    for name, digits in (("top1", 2), ("top5", 2), ("loss", 6)):
        before, now = recorded[name], results[name]
        if before is None:
            continue
        limit = LOSS * abs(before) if name == "loss" else POINTS + 1e-9
        if now is None or not abs(now - before) <= limit:
            shown = "none" if now is None else f"{now:.{digits}f}"
            found.append(f"{name} was {before:.{digits}f} and is {shown}")
    return found


def print_verification(console: Console, recorded: dict[str, Any], results: dict[str, Any]) -> bool:
    """Print whether the recorded results hold, and return it."""
    before, now = ({name: about.get(name) for name in _FREE} for about in (recorded, results))
    for change in changes(before, now):
        console.print(f"recorded {change}")
    found = differences(recorded, results)
    for line in found:
        console.print(f"differs: {line}")
    if not found:
        moved = abs(results["top1"] - recorded["top1"])
        console.print(f"verified: top-1 within {moved:.2f} points on {results['images']} images")
    return not found
