"""Comparing an evaluation with an earlier one: `hvit-eval --verify results.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError

# Other devices and versions round otherwise, and pictures between two classes change sides.
POINTS, LOSS = 0.1, 1e-3
_NEEDED = ("method", "args", "resolution", "dtype", "batch_size", "data", "checkpoint", "top1")
_SAME = ("data_sha256", "checkpoint_sha256", "images")
_FREE = ("device", "devices", "matmul_precision", "versions")


def read_results(path: Path) -> dict[str, Any]:
    """Read what `--output` wrote.

    Raises:
        InputError: if it cannot be read, or is not the result of a whole evaluation.
    """
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(recorded, dict) or not all(name in recorded for name in _NEEDED):
        raise InputError(f"{path} holds no results, as hvit-eval --output writes them")
    if recorded.get("partial") or not isinstance(recorded["top1"], (int, float)):
        raise InputError(f"{path} is of an evaluation that did not finish")
    return recorded


def words_of(path: Path, recorded: dict[str, Any], *, data: str | None) -> list[str]:
    """Write an evaluation as the command line that repeats it.

    Args:
        path: the file that `recorded` was read from.
        recorded: its content.
        data: pictures to use instead of the recorded ones, if any.
    """
    size = recorded["resolution"]
    size = size if isinstance(size, list) else [size]
    return [
        *([] if data is not None else [recorded["data"]]),
        *("--checkpoint", recorded["checkpoint"]),
        *("--method", recorded["method"], "--method-args", str(path)),
        *("-r", *map(str, size), "--dtype", recorded["dtype"]),
        *("-b", str(recorded["batch_size"])),
        *("--on-error", "skip" if recorded.get("skipped") else "stop"),
    ]


def differences(recorded: dict[str, Any], results: dict[str, Any]) -> list[str]:
    """Compare two results.

    Args:
        recorded: the earlier one.
        results: the one of now.

    Returns:
        What differs by more than rounding can explain; empty if nothing does.
    """
    found = [
        f"{name} was {recorded[name]} and is {results[name]}"
        for name in _SAME
        if recorded.get(name) is not None and recorded[name] != results[name]
    ]
    for name, limit in (("top1", POINTS), ("top5", POINTS)):
        before, now = recorded.get(name), results[name]
        if before is not None and not abs(now - before) <= limit + 1e-9:
            found.append(f"{name} was {before:.2f} and is {now:.2f}")
    before, now = recorded.get("loss"), results["loss"]
    if before is not None and not abs(now - before) <= LOSS * abs(before):
        found.append(f"loss was {before:.6f} and is {now:.6f}")
    return found


def report_verification(console: Console, recorded: dict[str, Any], results: dict[str, Any]) -> int:
    """Say whether a result holds.

    Args:
        console: where to.
        recorded: the earlier result.
        results: the one of now.

    Returns:
        The exit status: 0, or 1 if it does not hold.
    """
    for name in _FREE:
        if recorded.get(name) is not None and recorded[name] != results[name]:
            console.print(f"recorded with {name} {recorded[name]}; here {results[name]}")
    found = differences(recorded, results)
    for line in found:
        console.print(f"differs: {line}")
    if not found:
        moved = abs(results["top1"] - recorded["top1"])
        console.print(f"verified: top-1 within {moved:.2f} points on {results['images']} images")
    return int(bool(found))
