"""A run's folder and its settings, which a resumed run must share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from hvit_jax.config import ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.processes import OPTIONS
from hvit_jax.reducers import Reducer

# Options that a resumed run may change.
FREE = ("resume", "output", "workers", "log_every", "save_every", "method_args", "tensorboard")
FREE += ("shard_parameters", *OPTIONS)


def gather_settings(
    options: argparse.Namespace, config: ViTConfig, reducer: Reducer
) -> dict[str, Any]:
    """Gather what a resumed run must share with the one that it goes on with.

    Args:
        options: of the command line.
        config: the model's sizes.
        reducer: the method, resolved for them.
    """
    fixed = {name: value for name, value in vars(options).items() if name not in FREE}
    method = {"name": reducer.name, "options": reducer.options()}
    settings = {"config": dataclasses.asdict(config), "method": method, "options": fixed}
    return json.loads(json.dumps(settings))


def open_output(output: Path, settings: dict[str, Any], *, resume: bool) -> Path:
    """Make the output folder, or check that it belongs to the run to be resumed.

    Args:
        output: the folder.
        settings: from `gather_settings`.
        resume: whether to go on with the run in it.

    Returns:
        The folder.

    Raises:
        InputError: if it exists without being resumed, or holds no run, another, or a finished one.
    """
    path = output / "settings.json"
    if not resume:
        if output.exists():
            raise InputError(f"{output} exists already; give --resume to go on, or another folder")
        output.mkdir(parents=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return output
    if not path.is_file():
        raise InputError(f"{output} holds no run to resume; leave --resume out to begin one")
    if (output / "checkpoint").exists():
        raise InputError(f"{output} is finished: {output / 'checkpoint'} is its result")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if before != settings:
        raise InputError(f"{_difference(before, settings)}; repeat the first command to resume")
    return output


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the settings that differ between the first command and this one."""
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for old, new in ((before[part], now[part]) for part in now)
        for name in new
        if old.get(name) != new.get(name)
    ]
    return "; ".join(changed) or "the settings differ"
