"""A model as `jax.export` programs, one a platform, and its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.exporting.config import PLATFORMS, ExportConfig
from hvit_jax.exporting.forward import Weights, explain_unknown_batch, forward, pictures
from hvit_jax.models.vit import ViT
from hvit_jax.ops.platform import compiled_for
from hvit_jax.pictures import Preprocessing

WEIGHTS = "weights.npz"


def write_programs(
    folder: Path, model: ViT, weights: Weights, preprocessing: Preprocessing, config: ExportConfig
) -> dict[str, Any]:
    """Write a program for each platform, and the weights unless they are inside.

    Args:
        folder: takes the files.
        model: the model, with plain XLA's attention.
        weights: its weights, see `named_weights`.
        preprocessing: what the program normalises pictures with.
        config: for which platforms and batch, and where the weights go.

    Returns:
        What `export.json` says of the files.

    Raises:
        InputError: if the method needs to know the batch.
    """
    inside, convention = config.weights == "inside", None
    programs = {name: f"model.{name}.jaxexport" for name in dict.fromkeys(config.platforms)}
    for platform, file in programs.items():
        exported = _export(model, weights, platform, config.rows, preprocessing, inside=inside)
        (folder / file).write_bytes(exported.serialize())
        convention = exported.calling_convention_version
    return {
        "programs": programs,
        "calling_convention_version": convention,
        "weights": None if inside else _write_weights(folder / WEIGHTS, weights),
    }


def _export(
    model: ViT,
    weights: Weights,
    platform: str,
    batch: int | None,
    preprocessing: Preprocessing,
    *,
    inside: bool,
) -> jax.export.Exported:
    """Export the program, which takes a dictionary of weights (empty if inside) and pictures."""
    run = forward(model, preprocessing)

    def classify(given, pixels):
        arrays = weights if inside else given
        return run([jnp.asarray(arrays[name]) for name in weights], pixels)

    shapes = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in weights.items()}
    program = jax.export.export(jax.jit(classify), platforms=[platform])
    with explain_unknown_batch(model, batch), compiled_for(PLATFORMS[platform]):
        return program({} if inside else shapes, pictures(model, batch))


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
