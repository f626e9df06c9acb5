"""Comparing an evaluation with an earlier one: `hvit eval --verify results.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError

# Other devices and versions round otherwise, and pictures between two classes change sides.
POINTS, LOSS = 0.1, 1e-3
_NEEDED = ("method", "args", "resolution", "dtype", "batch_size", "data", "checkpoint", "top1")
_SAME = ("data_sha256", "checkpoint_sha256", "images", "not_finite", "skipped")
_WORDS = ("method", "dtype", "data", "checkpoint", "attention", "on_error")
_NUMBERS = ("top1", "top5", "loss")
_LARGEST = 1e300
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
        raise InputError(f"{path} holds no results, as hvit eval --output writes them")
    if recorded.get("partial") or not isinstance(recorded["top1"], (int, float)):
        raise InputError(f"{path} is of an evaluation that did not finish")
    _check(path, recorded)
    return recorded


def _check(path: Path, recorded: dict[str, Any]) -> None:
    """Refuse what no evaluation writes, before it becomes words of a command line.

    Raises:
        InputError: for a value of the wrong kind.
    """
    size = recorded["resolution"]
    counts = [recorded["batch_size"], *(size if isinstance(size, list) else [size])]
    given = {
        name: recorded[name] for name in (*_WORDS, *_NUMBERS) if recorded.get(name) is not None
    }
    wrong = [
        *(name for name in _NEEDED if recorded[name] is None),
        *(name for name in given if name in _WORDS and not _is_word(given[name])),
        *(name for name in given if name in _NUMBERS and not _is_number(given[name])),
        *(["resolution or batch_size"] if any(type(count) is not int for count in counts) else []),
        *(["unroll"] if not isinstance(recorded.get("unroll", False), bool) else []),
    ]
    if wrong:
        raise InputError(f"{path} has a {wrong[0]} that hvit eval --output does not write")


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith("-")


def _is_number(value: Any) -> bool:
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return whole and -_LARGEST < value < _LARGEST


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
        *("--attention", recorded.get("attention", "auto")),
        *(["--unroll"] if recorded.get("unroll") else []),
        *("--on-error", recorded.get("on_error", "skip" if recorded.get("skipped") else "stop")),
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
    for name in _NUMBERS:
        before, now = recorded.get(name), results[name]
        if before is None:
            continue
        limit = LOSS * abs(before) if name == "loss" else POINTS + 1e-9
        if now is None or not abs(now - before) <= limit:
            digits = 6 if name == "loss" else 2
            shown = "none" if now is None else f"{now:.{digits}f}"
            found.append(f"{name} was {before:.{digits}f} and is {shown}")
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
