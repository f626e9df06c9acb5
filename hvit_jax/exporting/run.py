"""The folder that an export writes: programs, weights, description, loader."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from hvit_jax import demo
from hvit_jax.api import load, with_resolution
from hvit_jax.checkpoint import describe_checkpoint, read_description
from hvit_jax.data.preprocess import MEAN, STD, resize_and_crop
from hvit_jax.exporting.config import ExportConfig
from hvit_jax.exporting.program import Weights, export_program, weights_of
from hvit_jax.models.vit import ViT
from hvit_jax.system.files import checksums, new_folder, refuse_existing, require_space, write_json
from hvit_jax.system.provenance import describe_runtime

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS, LOADER = "export.json", "weights.npz", "run.py"
_TEMPLATE = Path(__file__).with_name("loader.py")
_IMPORT = "from hvit_jax.data.preprocess import resize_and_crop\n"


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a checkpoint under a method into a new folder, which appears whole or not at all.

    Args:
        config: what to export, for what, and where to.

    Returns:
        What the folder's export.json says.

    Raises:
        InputError: if the folder exists or cannot be written, the checkpoint cannot be read, or the
            model cannot be exported so.
    """
    refuse_existing(config.output)
    checkpoint = config.checkpoint or demo.checkpoint_dir()
    config.reducer.resolve(with_resolution(read_description(checkpoint).config, config.resolution))
    # JAX gives no guarantee for programs that call cuDNN, and makes them on NVIDIA GPUs only.
    model = load(
        checkpoint,
        config.reducer,
        resolution=config.resolution,
        dtype=config.dtype,
        attention="xla",
    )
    weights, inside = weights_of(model), config.weights == "inside"
    with new_folder(config.output) as folder:
        platforms = tuple(dict.fromkeys(config.platforms))
        copies = len(platforms) if inside else 1
        size = sum(array.nbytes for array in weights.values())
        require_space(config.output, folder, copies * size + 2**20)
        programs, convention = {}, None
        for platform in platforms:
            program, convention = export_program(
                model, weights, platform=platform, batch=config.rows, inside=inside
            )
            programs[platform] = f"model.{platform}.jaxexport"
            (folder / programs[platform]).write_bytes(program)
        beside = None if inside else _write_weights(folder / WEIGHTS, weights)
        (folder / LOADER).write_text(loader_source(), encoding="utf-8")
        about = {
            **_describe(model, checkpoint, config.rows),
            "programs": programs,
            "calling_convention_version": convention,
            "weights": beside,
            "files": checksums(folder),
        }
        write_json(folder / DESCRIPTION, about)
    return about


def loader_source() -> str:
    """Write the loader: `loader.py`, with the source of the one function that it imports."""
    template = _TEMPLATE.read_text(encoding="utf-8")
    return template.replace(_IMPORT, f"\n{inspect.getsource(resize_and_crop)}\n", 1)


def _describe(model: ViT, checkpoint: Path, batch: int | None) -> dict[str, Any]:
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
        "batch": batch,
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
