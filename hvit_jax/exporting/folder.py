"""The folder that an export writes: programs, weights, description, loader."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvit_jax.checkpoint import describe_checkpoint, read_description
from hvit_jax.data.preprocess import MEAN, STD, resize_and_crop
from hvit_jax.exporting.program import Weights, export_program, weights_of
from hvit_jax.models.vit import ViT
from hvit_jax.system.files import checksums, new_folder, require_space
from hvit_jax.system.provenance import describe_runtime

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS, LOADER = "export.json", "weights.npz", "run.py"
_TEMPLATE = Path(__file__).with_name("loader.py")
_IMPORT = "from hvit_jax.data.preprocess import resize_and_crop\n"


@dataclass(frozen=True)
class Target:
    """What to export for.

    Attributes:
        platforms: names of `PLATFORMS`; each gets a program of its own, since what is fast on one
            is slow on another.
        batch: pictures at once; None for any number.
        inside: whether the programs hold the weights, instead of a file beside them.
    """

    platforms: tuple[str, ...]
    batch: int | None
    inside: bool


def write_export(directory: str | Path, model: ViT, checkpoint: str | Path, target: Target) -> None:
    """Export a model into a new folder, which appears whole or not at all.

    Args:
        directory: must not exist.
        model: the model; its attention is "xla".
        checkpoint: what its weights were read from.
        target: what to export for.

    Raises:
        InputError: if the folder exists or cannot be written, or the model cannot be exported so.
    """
    weights = weights_of(model)
    with new_folder(directory) as folder:
        copies = len(target.platforms) if target.inside else 1
        size = sum(array.nbytes for array in weights.values())
        require_space(directory, folder, copies * size + 2**20)
        programs, convention = {}, None
        for platform in target.platforms:
            program, convention = export_program(
                model, weights, platform=platform, batch=target.batch, inside=target.inside
            )
            programs[platform] = f"model.{platform}.jaxexport"
            (folder / programs[platform]).write_bytes(program)
        beside = None if target.inside else _write_weights(folder / WEIGHTS, weights)
        (folder / LOADER).write_text(loader_source(), encoding="utf-8")
        about = {
            **_describe(model, checkpoint, target),
            "programs": programs,
            "calling_convention_version": convention,
            "weights": beside,
            "files": checksums(folder),
        }
        (folder / DESCRIPTION).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def loader_source() -> str:
    """Write the loader: `loader.py`, with the source of the one function that it imports."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.replace(_IMPORT, f"\n{inspect.getsource(resize_and_crop)}\n", 1)


def _describe(model: ViT, checkpoint: str | Path, target: Target) -> dict[str, Any]:
    description = read_description(checkpoint)
    names = description.classes or map(str, range(model.config.num_classes))
    return {
        "format_version": FORMAT_VERSION,
        # The precision of matrix products is part of the programs; the device only made them.
        **describe_runtime(),
        "model": dataclasses.asdict(model.config),
        "checkpoint": str(checkpoint),
        **describe_checkpoint(checkpoint),
        "method": model.reducer.name,
        "args": model.reducer.options(),
        "dtype": model.dtype.name,
        "attention": "xla",
        "batch": target.batch,
        "input": {
            "dtype": "uint8",
            "resolution": list(model.config.image_shape),
            "channels": "RGB, last",
            "resize": "short side to the resolution, bicubic with antialiasing (Pillow)",
            "crop": "centre",
            "normalised_inside": {"scale": "1/255", "mean": MEAN, "std": STD},
        },
        "output": "logits" if model.config.num_classes else "features of CLS",
        "classes": list(names),
    }


def _write_weights(path: Path, weights: Weights) -> dict[str, Any]:
    """Write an .npz that NumPy alone can read: it has no bfloat16."""
    stored = {
        name: array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        for name, array in weights.items()
    }
    np.savez(path, allow_pickle=False, **stored)
    return {
        "file": path.name,
        "dtypes": {name: array.dtype.name for name, array in weights.items()},
    }
