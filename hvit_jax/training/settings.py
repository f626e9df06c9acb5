"""A run's folder and its settings.json, which a resumed run must share."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax

from hvit_jax.checkpoint import describe_checkpoint
from hvit_jax.data.fingerprint import data_sha256, names_crc32
from hvit_jax.data.source import Source
from hvit_jax.dense.folders import Scenes
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.errors import InputError
from hvit_jax.fields import as_json
from hvit_jax.system.files import new_folder, read_json, write_json
from hvit_jax.system.provenance import changes, describe_runtime
from hvit_jax.training.trainer import Trainer

# Options that a resumed run may change; those of the method are settings of their own.
_FREE = ("resume", "output", "workers", "log_every", "save_every", "tensorboard")
_FREE += ("cache", "on_error", "shard_parameters", "processes", "reducer")
# What else it may change, which is said and noted: machines differ, damaged pictures are repaired.
_NOTED = ("data_sha256", "validation_sha256")
_NOTED += ("device", "devices", "processes", "matmul_precision", "versions")
_FILE, _PARTS = "settings.json", ("args", "config", "model")
RESULT = "checkpoint"  # The folder in OUTPUT that a finished run has.


def describe_run(
    options: dict[str, Any],
    checkpoint: Path | None,
    trainer: Trainer,
    pictures: Source | Scenes,
    validation: Source | Scenes | None,
) -> dict[str, Any]:
    """Describe a run: what its processes, and resumed ones, must share, and what runs it.

    `options` are those of the record; the method and its options have entries of their own, from
    which `make_reducer` makes it again.
    """
    settings = {
        "method": trainer.reducer.name,
        "args": as_json(trainer.reducer),
        "model": dataclasses.asdict(trainer.sizes),
        "config": {name: value for name, value in options.items() if name not in _FREE},
        # Steps, order and labels follow from these; what is in the files may be repaired.
        "pictures": f"{len(pictures)} with names of CRC {names_crc32(pictures.paths):08x}",
        "data_sha256": _sha256(pictures),
        "validation_sha256": None if validation is None else _sha256(validation),
        **describe_checkpoint(checkpoint),
        **describe_runtime(trainer.placement.devices),
        "processes": trainer.placement.processes,
    }
    return json.loads(json.dumps(settings))


def _sha256(pictures: Source | Scenes) -> str:
    return pictures.sha256() if isinstance(pictures, Scenes) else data_sha256(pictures)


def open_output(output: Path, settings: dict[str, Any], *, resume: bool) -> dict[str, Any]:
    """Make the output folder, or check that it belongs to the run to be resumed.

    Process 0 does that for all, which share the folder. Where there is none, a run begins, even
    with `resume`; one that holds no run, or another, is refused.

    Returns:
        The settings that the run was begun with, and how it was resumed.
    """
    same = {**settings["config"], **settings, "config": None, "resume": resume}
    check_same(f"training under {settings['method']}", **same)
    if jax.process_index() == 0:
        if output.exists():
            settings = _resumed(output, settings, resume)
        else:
            with new_folder(output) as folder:
                write_json(folder / _FILE, settings)
            if resume:
                print("nothing to resume: starting from the beginning", file=sys.stderr)
    settings = gather(settings)[0]  # The others wait for process 0 here.
    if not output.is_dir():
        raise InputError(f"{output} is not the folder that process 0 made; all need to see it")
    return settings


def _resumed(output: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Check that a folder holds the same run, and note what else has changed."""
    if not resume:
        raise InputError(
            f"{output} exists already; --resume continues it, or choose another folder"
        )
    if not (output / _FILE).is_file():
        raise InputError(f"{output} holds no run to resume; leave --resume out to begin one")
    before = read_json(output / _FILE)
    if not all(isinstance(before.get(part), dict) for part in _PARTS):
        has_no = f"it has no {', '.join(_PARTS)}"
        raise InputError(f"{output / _FILE} is damaged, or of another release: {has_no}")
    # Options of different methods have nothing in common.
    compared = before if before.get("method") == settings["method"] else {**before, "args": {}}
    # Other sizes are named only where they do not follow from another option.
    found = changes(compared, settings, but=(*_NOTED, "model")) or changes(
        {"model": before["model"]}, {"model": settings["model"]}
    )
    if found:
        differing = "; ".join(found)
        raise InputError(f"{output} was begun {differing}; repeat the first command to resume")
    if (output / RESULT).exists():
        return before
    resumed = before.get("resumed", [])
    newest = {**before, **(resumed[-1] if resumed else {})}
    if noted := changes(newest, settings):
        print(f"{output} was written {'; '.join(noted)}", file=sys.stderr)
        before["resumed"] = [*resumed, {name: settings[name] for name in _NOTED}]
        write_json(output / _FILE, before)
    return before
