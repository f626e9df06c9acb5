"""The folder that an export writes: programs (uint8 pictures in, logits out), weights, loader."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from rich.console import Console

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import (
    Description,
    choose_method,
    describe_checkpoint,
    fitted_parameters,
    read_description,
)
from hvit_jax.config import Preprocessing
from hvit_jax.data import picture
from hvit_jax.data.preprocess import corner, normalize, resize_and_crop, resized_size
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError, first_line
from hvit_jax.exporting.config import PLATFORMS, ExportConfig
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model, flatten
from hvit_jax.models.vit import ViT, part_weights
from hvit_jax.ops.platform import compiled_for
from hvit_jax.reducers import warn_without_budgets
from hvit_jax.system.files import checksums, new_folder, refuse_existing, require_space, write_json
from hvit_jax.system.progress import plain_console
from hvit_jax.system.provenance import describe_runtime

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS, LOADER = "export.json", "weights.npz", "run.py"
MOST_BYTES = 2**31  # of a FlatBuffer
_TEMPLATE = Path(__file__).with_name("loader.py")
_OWN_IMPORTS = re.compile("(from hvit_jax.*\n)+")
Weights = dict[str, np.ndarray]


def export(
    config: ExportConfig, *, messages: Console | None = None, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """Export a checkpoint under a method into a new folder, which appears whole or not at all.

    Args:
        config: what to export, for what, and where to.
        messages: is told of a method that `config` does not name; default: stderr.
        most_bytes: of weights inside a program.

    Returns:
        What the folder's export.json says.

    Raises:
        InputError: if the folder exists or cannot be written, the checkpoint cannot be read, or the
            model cannot be exported so.
    """
    refuse_several("hvit export")
    refuse_existing(config.output)
    checkpoint = config.folder
    description = read_description(checkpoint)
    sizes = with_resolution(description.config, config.resolution)
    messages = messages or plain_console(stderr=True)
    reducer = choose_method(config.reducer, description, messages.print)
    reducer.resolve(sizes)  # Finds mistakes before the weights are read.
    compute = dataclasses.replace(config.compute, attention="xla")
    model = build_model(sizes, reducer, fitted_parameters(checkpoint, sizes), compute)
    warn_without_budgets(model.reducer, sizes, messages.print)
    tree = nnx.to_pure_dict(nnx.state(model))
    weights = {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}
    size, inside = sum(array.nbytes for array in weights.values()), config.weights == "inside"
    if inside and size >= most_bytes:
        raise InputError(
            f"{size / 1e9:.1f} GB of weights do not fit inside a program, which may have "
            f"{most_bytes / 1e9:.1f} GB; use --weights beside"
        )
    with new_folder(config.output) as folder:
        platforms = tuple(dict.fromkeys(config.platforms))
        require_space(config.output, folder, (len(platforms) if inside else 1) * size + 2**20)
        programs, convention = {name: f"model.{name}.jaxexport" for name in platforms}, None
        for platform, file in programs.items():
            exported = _export(
                model, weights, platform, config.rows, description.preprocessing, inside=inside
            )
            (folder / file).write_bytes(exported.serialize())
            convention = exported.calling_convention_version
        beside = None if inside else _write_weights(folder / WEIGHTS, weights)
        (folder / LOADER).write_text(_loader_source(), encoding="utf-8")
        about = {
            **_describe(model, description, config.rows),
            "checkpoint": str(checkpoint),
            **describe_checkpoint(checkpoint),
            "programs": programs,
            "calling_convention_version": convention,
            "weights": beside,
            "files": checksums(folder),
        }
        write_json(folder / DESCRIPTION, about)
    return about


def _export(
    model: ViT,
    weights: Weights,
    platform: str,
    batch: int | None,
    preprocessing: Preprocessing,
    *,
    inside: bool,
) -> jax.export.Exported:
    """Export a model's forward pass, from pictures as `resize_and_crop` prepares them.

    Returns:
        The program, which takes a dictionary of weights (empty if they are inside) and pictures
        (B, H, W, 3) in uint8.

    Raises:
        InputError: if the method needs to know the batch.
    """
    with_weights, _ = part_weights(model)  # `weights` are the same, in the same order.

    def classify(
        given: dict[str, Array], pixels: UInt8[Array, "B H W 3"]
    ) -> Float[Array, "B classes"]:
        arrays = weights if inside else given
        images = normalize(pixels, preprocessing.mean, preprocessing.std)
        return with_weights([jnp.asarray(arrays[name]) for name in weights])(images)

    shapes = {name: jax.ShapeDtypeStruct(each.shape, each.dtype) for name, each in weights.items()}
    symbol = jax.export.symbolic_shape("b", constraints=["b >= 1"])[0]
    rows = symbol if batch is None else batch
    pixels = jax.ShapeDtypeStruct((rows, *model.config.image_shape, 3), np.uint8)
    program = jax.export.export(jax.jit(classify), platforms=[platform])
    try:
        with compiled_for(PLATFORMS[platform]):
            return program({} if inside else shapes, pixels)
    # JAX and methods raise these where a size is asked for that is not known yet.
    except (jax.errors.InconclusiveDimensionOperation, TypeError, InputError) as error:
        if batch is not None:
            raise
        raise InputError(
            f"{model.reducer.name} with these options needs to know the batch size; give it with "
            f"--batch N ({first_line(error)})"
        ) from error


def _loader_source() -> str:
    """Write the loader: `loader.py`, with the source of what it imports from this package."""
    own = "from types import SimpleNamespace as Preprocessing\n\nInputError = ValueError\n"
    lines = inspect.getsource(picture).splitlines()[1:]
    lines = [line for line in lines if not line.startswith(("from __future__", "from hvit_jax"))]
    parts = [own, "\n".join(lines).strip() + "\n"]
    parts += map(inspect.getsource, (resized_size, corner, resize_and_crop))
    return _OWN_IMPORTS.sub(lambda _: "\n\n".join(parts), _TEMPLATE.read_text(encoding="utf-8"), 1)


def _describe(model: ViT, description: Description, batch: int | None) -> dict[str, Any]:
    names = description.classes or map(str, range(model.config.num_classes))
    return {
        "format_version": FORMAT_VERSION,
        # The precision of matrix products is part of the programs; the device only made them.
        **describe_runtime(),
        "model": dataclasses.asdict(model.config),
        "method": model.reducer.name,
        "args": model.reducer.options(),
        "dtype": model.dtype.name,
        "attention": "xla",
        "batch": batch,
        "input": {
            "dtype": "uint8",
            "resolution": list(model.config.image_shape),
            "channels": "RGB, last",
            "preprocessing": as_json(description.preprocessing),
            "normalised_inside": "by 255, then mean and std",
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
