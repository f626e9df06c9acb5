"""What a comparison prints: tables, and the setting to use as commands."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hvit_jax.comparing.config import CompareConfig
from hvit_jax.comparing.mapping import Maps
from hvit_jax.comparing.rows import (
    Comparison,
    Goal,
    Trial,
    at_level,
    difference,
    front,
    is_worse,
    measured,
    show_change,
    show_score,
)
from hvit_jax.comparing.scores import SCORES
from hvit_jax.comparing.settings import LOWRES
from hvit_jax.comparing.trials import Bench
from hvit_jax.dense.config import DepthConfig, SegmentConfig
from hvit_jax.evaluation import EvalConfig
from hvit_jax.fields import given
from hvit_jax.pictures import Windows

_STEADY = 1.3  # The fastest round over the slowest, of most settings on an idle machine.


def table(rows: Sequence[Trial], unit: str) -> list[tuple[str, ...]]:
    """Write all settings that did not fail as cells below a row of titles, dense first.

    The front's are numbered, from the fastest on.
    """
    good = measured(rows)
    numbers = {id(row): str(number) for number, row in enumerate(front(good), 1)}
    names = list(good[0].scores)
    first = SCORES[names[0]]
    speed = f"{unit}/s{_on_devices(rows[0])}"
    head: tuple[str, ...] = ("", "method", "cost", first.title, "against dense")
    head += (*(SCORES[name].title for name in names[1:]), speed, "x dense", "rounds", "memory (MB)")
    lines: list[tuple[str, ...]] = [head]
    for row in sorted(good, key=lambda row: -row.cost):
        low, high = row.speedup_range or (0.0, 0.0)
        memory = "" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f}"
        others = [show_score(row, name) for name in names[1:]]
        lines.append(
            (
                numbers.get(id(row), ""),
                row.name,
                f"{row.cost:.2f}",
                show_score(row, names[0]),
                show_change(row, names[0]),
                *others,
                f"{row.throughput:.1f}",
                f"{row.speedup:.2f}",
                f"{low:.2f} to {high:.2f}",
                memory,
            )
        )
    return lines


def machine(device: dict[str, Any]) -> str:
    """Name the machine of a comparison, as `describe_device` has it."""
    many = f"{device['devices']} x " if device["devices"] > 1 else ""
    return f"{many}{device['device']} ({device['processor']}, {device['cpus']} cores)"


def _on_devices(row: Trial) -> str:
    return f" on {row.devices} devices" if row.devices > 1 else ""


def result(row: Trial) -> str:
    """Put what a setting came to in one line."""
    if row.error is not None:
        return f"{row.name} failed: {row.error}"
    change = show_change(row, row.first)
    against = f", {change} against dense" if change else ""
    return (
        f"{row.name}: {SCORES[row.first].title} {show_score(row, row.first)}{against}, "
        f"{row.speedup:.2f} x dense"
    )


def summary(row: Trial) -> str:
    """Put a setting in a few words."""
    speed = f"{row.speedup:.2f} x dense{_on_devices(row)}"
    return f"{row.name}: {SCORES[row.first].title} {show_change(row, row.first)}, {speed}"


def at_levels(rows: Sequence[Trial], levels: Sequence[float]) -> list[str]:
    """Say which method is the best at every level of cost, and which baselines are as good."""
    lines = []
    for level in sorted(levels, reverse=True):
        there = at_level(rows, level)
        if not there:
            continue
        best = there[0]
        equal = [row.name for row in there[1:] if row.is_baseline and not is_worse(row, best)]
        lines.append(
            f"at {level:g} of the cost: {best.name} ({show_change(best, best.first)})"
            + (f"; as good, as far as the pictures tell: {', '.join(equal)}" if equal else "")
        )
    return lines


def conclusion(done: Comparison, goal: Goal) -> list[str]:
    """Name the setting to use, and the baselines that are as good."""
    chosen = done.chosen
    if chosen is None:
        return [f"nothing reaches {goal}: none of those tried is faster than dense here"]
    what = f"to use for {goal}" if done.reached else f"nothing reaches {goal}; nearest"
    lines = [f"{what}: {summary(chosen)}"]
    if chosen.is_baseline:
        lines.append(f"{chosen.method} is a baseline: no method that was tried does better here")
    for row in done.rivals:
        change, ends = SCORES[row.first].show_change(*difference(row, chosen))
        lines.append(
            f"as good, as far as {done.pictures} pictures tell: the baseline {row.name}, "
            f"{change} ({ends}) against it, {row.speedup:.2f} x dense"
        )
    return lines


def unsteady(rows: Sequence[Trial]) -> list[str]:
    """Say where the machine was too busy for its speeds to be trusted."""
    ranges = [row.speedup_range for row in measured(rows) if row.speedup_range is not None]
    spread = statistics.median(high / low for low, high in ranges)
    if spread < _STEADY:
        return []
    return [
        f"speeds are uncertain: the fastest of five rounds beside dense was {spread:.1f} times the "
        "slowest in half of the settings, as on a busy machine; --resume keeps them, a new run "
        "measures again"
    ]


def failures(done: Comparison) -> list[str]:
    """Say what was not tried, and what failed."""
    return [
        *(f"{method}: {why}" for method, why in done.left_out.items()),
        *(f"failed: {row.name}: {row.error}" for row in done.rows if row.error),
    ]


def commands(row: Trial, config: CompareConfig, bench: Bench) -> list[str]:
    """Write a setting as a command that measures it on all pictures, if one does, and as Python."""
    if isinstance(bench, Maps):
        return _commands_of_maps(row, config, bench)
    resolution = row.shape if row.method == LOWRES else config.resolution
    lines = []
    if row.first == "top1":
        evaluation = EvalConfig(
            data=config.data,
            checkpoint=config.checkpoint,
            resolution=resolution,
            preparing=config.preparing,
            labelling=config.labelling,
            classifying=config.classifying,
            compute=config.compute,
            batch_size=row.batch,
            reducer=row.reducer,
        )
        lines.append(shlex.join(["hvit", "eval", *evaluation.words()]))
    return [*lines, _python(row, config, resolution)]


def _commands_of_maps(row: Trial, config: CompareConfig, bench: Maps) -> list[str]:
    """Write a setting of a model that makes maps; lower resolutions are windows and a scale."""
    windows, scales = config.windows, (1.0,)
    if row.method == LOWRES:
        view = bench.view_at(row.shape)
        windows = replace(windows, window=view.layout.window, stride=view.layout.stride)
        scales = (view.scale,)
    lines = []
    options: dict[str, Any] = {
        "data": config.data,
        "checkpoint": config.checkpoint,
        "windows": windows,
        "scales": scales,
        "restore": None if row.method == LOWRES else config.restore,
        "compute": config.compute,
        "batch_size": row.batch,
        "reducer": row.reducer,
    }
    if row.first == "miou":
        truth = replace(config.truth, exif=config.preparing.exif)
        mapping = SegmentConfig(**options, truth=truth)
        lines.append(shlex.join(["hvit", "segment", *mapping.words()]))
    elif row.first == "rmse":
        own = {"truth": config.truth.truth, "split": config.truth.split}
        truth = replace(config.depth, **own, exif=config.preparing.exif)
        mapping = DepthConfig(**options, truth=truth)
        lines.append(shlex.join(["hvit", "depth", *mapping.words()]))
    changed = row.method == LOWRES or config.windows != Windows()
    return [*lines, _python(row, config, row.shape if changed else None)]


def _python(row: Trial, config: CompareConfig, resolution: int | tuple[int, int] | None) -> str:
    """Write how Python loads a setting."""
    folder = "hvit_jax.demo.checkpoint_dir()"
    if config.checkpoint is not None:
        folder = repr(str(config.checkpoint))
    method = row.reducer
    size = {} if resolution is None else {"resolution": resolution}
    restore = {} if config.restore is None or row.method == LOWRES else {"restore": config.restore}
    options = {**given(method), **size, **restore, **given(config.compute)}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    return f"hvit_jax.load({folder}, {method.name!r}{arguments})"
