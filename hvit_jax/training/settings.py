"""A run's folder and its settings.json, which a resumed run must share."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from hvit_jax.checkpoint import describe_checkpoint
from hvit_jax.data.fingerprint import data_sha256, names_crc32
from hvit_jax.data.source import Source
from hvit_jax.errors import InputError
from hvit_jax.fields import as_json
from hvit_jax.system.files import new_folder, read_json, write_json
from hvit_jax.system.provenance import changes
from hvit_jax.training.trainer import Trainer

# Options that a resumed run may change; those of the method are settings of their own.
_FREE = ("resume", "output", "workers", "log_every", "save_every", "tensorboard")
_FREE += ("shard_parameters", "processes", "reducer")
# What else it may change, which is said and noted: machines differ, damaged pictures are repaired.
_NOTED = ("data_sha256", "validation_sha256")
_NOTED += ("device", "devices", "processes", "matmul_precision", "versions")
_PARTS = ("args", "config", "model")


def gather_settings(
    trainer: Trainer, pictures: Source, validation: Source | None
) -> dict[str, Any]:
    """Gather what all processes of a run, and all resumed ones, must share.

    Args:
        trainer: of the run.
        pictures: to train on.
        validation: to validate on, if any.
    """
    config, reducer = trainer.config, trainer.reducer
    fixed = {name: value for name, value in as_json(config).items() if name not in _FREE}
    settings = {
        "method": reducer.name,
        "args": as_json(reducer),
        "model": dataclasses.asdict(trainer.model_config),
        "config": fixed,
        # Steps, order and labels follow from these; what is in the files may be repaired.
        "pictures": f"{len(pictures)} with names of CRC {names_crc32(pictures):08x}",
        "data_sha256": data_sha256(pictures),
        "validation_sha256": None if validation is None else data_sha256(validation),
        **describe_checkpoint(config.checkpoint),
    }
    return json.loads(json.dumps(settings))


def open_output(output: Path, settings: dict[str, Any], *, resume: bool) -> Path:
    """Make the output folder, or check that it belongs to the run to be resumed.

    Args:
        output: the folder.
        settings: from `gather_settings`, with what runs it.
        resume: whether to resume the run in it; where there is no folder, a run begins.

    Returns:
        The folder.

    Raises:
        InputError: if it exists without being resumed, or holds no run, another, or a finished one.
    """
    if not output.exists():
        with new_folder(output) as folder:
            write_json(_path(folder), settings)
        if resume:
            print("nothing to go on with: this is the beginning", file=sys.stderr)
        return output
    if not resume:
        raise InputError(f"{output} exists already; give --resume to go on, or another folder")
    if not _path(output).is_file():
        raise InputError(f"{output} holds no run to resume; leave --resume out to begin one")
    if (output / "checkpoint").exists():
        raise InputError(f"{output} is finished: {output / 'checkpoint'} is its result")
    before = read_settings(output)
    if changed := _refused(before, settings):
        found = "; ".join(changed)
        raise InputError(f"{output} was begun {found}; repeat the first command to resume")
    _note_changes(output, before, settings)
    return output


def _note_changes(output: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Say, and add to the settings, what differs from the newest start without forbidding it."""
    resumed = before.get("resumed", [])
    newest = {**before, **(resumed[-1] if resumed else {})}
    if noted := changes(_with_options(newest), _with_options(now)):
        print(f"{output} was written {'; '.join(noted)}", file=sys.stderr)
        resumed = [*resumed, {name: now[name] for name in _NOTED if name in now}]
        write_json(_path(output), {**before, "resumed": resumed})


def read_settings(output: Path) -> dict[str, Any]:
    """Read the settings that a run was begun with, and how it was resumed.

    Raises:
        InputError: if they are damaged.
    """
    path = _path(output)
    content = read_json(path)
    if not all(isinstance(content.get(part), dict) for part in _PARTS):
        raise InputError(f"{path} is damaged, or of another release: it has no {', '.join(_PARTS)}")
    return content


def _path(output: Path) -> Path:
    return output / "settings.json"


def _with_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Write the configuration as one level of options, for `changes`."""
    options = dict(settings["config"])
    options |= options.pop("compute")
    return {**settings, "config": None, "options": options}


def _refused(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what differs between the first command and this one, and only the cause of it."""
    if before.get("method") != now["method"]:
        before = {**before, "args": {}}  # Options of different methods have nothing in common.
    found = changes(_with_options(before), _with_options(now), but=(*_NOTED, "model"))
    return found or changes({"model": before["model"]}, {"model": now["model"]})
