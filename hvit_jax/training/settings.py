"""A run's folder and its settings, which a resumed run must share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from hvit_jax.checkpoint import describe_checkpoint
from hvit_jax.commands.method_options import OPTION_PREFIX
from hvit_jax.config import ViTConfig
from hvit_jax.data.fingerprint import data_sha256, names_crc32
from hvit_jax.data.source import Source
from hvit_jax.distributed.processes import OPTIONS
from hvit_jax.errors import InputError
from hvit_jax.reducers import Reducer
from hvit_jax.system.files import new_folder, write_atomically
from hvit_jax.system.provenance import changes

# Options that a resumed run may change, and those that settings name in another place.
FREE = ("resume", "output", "workers", "log_every", "save_every", "tensorboard")
FREE += ("shard_parameters", *OPTIONS, "method", "method_args")
# What else it may change, which is said and noted: machines differ, damaged pictures are repaired.
NOTED = ("data_sha256", "validation_sha256")
NOTED += ("device", "devices", "processes", "matmul_precision", "versions")


def gather_settings(
    options: argparse.Namespace,
    config: ViTConfig,
    reducer: Reducer,
    pictures: Source,
    validation: Source | None,
) -> dict[str, Any]:
    """Gather what all processes of a run must share.

    Args:
        options: of the command line.
        config: the model's sizes.
        reducer: the method, resolved for them.
        pictures: to train on.
        validation: to validate on, if any.
    """
    fixed = {
        name: value
        for name, value in vars(options).items()
        if name not in FREE and not name.startswith(OPTION_PREFIX)
    }
    settings = {
        "method": reducer.name,
        "args": reducer.options(),
        "config": dataclasses.asdict(config),
        "options": fixed,
        # Steps, order and labels follow from these; what is in the files may be repaired.
        "pictures": f"{len(pictures)} with names of CRC {names_crc32(pictures):08x}",
        "data_sha256": data_sha256(pictures),
        "validation_sha256": None if validation is None else data_sha256(validation),
        **describe_checkpoint(options.checkpoint),
    }
    return json.loads(json.dumps(settings))


def open_output(output: Path, settings: dict[str, Any], *, resume: bool) -> Path:
    """Make the output folder, or check that it belongs to the run to be resumed.

    Args:
        output: the folder.
        settings: from `gather_settings`, with what runs it.
        resume: whether to go on with the run in it; where there is no folder, a run begins.

    Returns:
        The folder.

    Raises:
        InputError: if it exists without being resumed, or holds no run, another, or a finished one.
    """
    begins = resume and not output.exists()
    if begins or not resume:
        if output.exists():
            raise InputError(f"{output} exists already; give --resume to go on, or another folder")
        with new_folder(output) as folder:
            _path(folder).write_text(_text(settings), encoding="utf-8")
        if begins:
            print("nothing to go on with: this is the beginning", file=sys.stderr)
        return output
    if not _path(output).is_file():
        raise InputError(f"{output} holds no run to resume; leave --resume out to begin one")
    if (output / "checkpoint").exists():
        raise InputError(f"{output} is finished: {output / 'checkpoint'} is its result")
    before = read_settings(output)
    changed = _refused(before, settings)
    if changed:
        found = "; ".join(changed)
        raise InputError(f"{output} was begun {found}; repeat the first command to resume")
    resumed = before.get("resumed", [])
    noted = changes({**before, **(resumed[-1] if resumed else {})}, settings)
    if noted:
        print(f"{output} was written {'; '.join(noted)}", file=sys.stderr)
        resumed = [*resumed, {name: settings[name] for name in NOTED if name in settings}]
        _write(output, {**before, "resumed": resumed})
    return output


def read_settings(output: Path) -> dict[str, Any]:
    """Read the settings that a run was begun with, and how it was resumed.

    Raises:
        InputError: if they are damaged.
    """
    path = _path(output)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    parts = ("args", "options", "config")
    if not isinstance(content, dict) or not all(
        isinstance(content.get(part), dict) for part in parts
    ):
        raise InputError(f"{path} is damaged, or of another release: it has no {', '.join(parts)}")
    return content


def _path(output: Path) -> Path:
    return output / "settings.json"


def _write(output: Path, settings: dict[str, Any]) -> None:
    write_atomically(_path(output), lambda file: file.write(_text(settings).encode()))


def _text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"


def _refused(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what differs between the first command and this one, and only the cause of it."""
    if before.get("method") != now["method"]:
        before = {**before, "args": {}}  # Options of different methods have nothing in common.
    found = changes(before, now, but=(*NOTED, "config"))
    return found or changes({"config": before["config"]}, {"config": now["config"]})
