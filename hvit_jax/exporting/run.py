"""The folder that an export writes: programs (uint8 pictures in, logits out), weights, loader."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from hvit_jax.checkpoint import (
    Description,
    choose_method,
    describe_checkpoint,
    fitted_parameters,
    read_description,
)
from hvit_jax.data import picture, preprocess
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError, import_optional
from hvit_jax.exporting import classify
from hvit_jax.exporting.config import ExportConfig
from hvit_jax.exporting.forward import named_weights
from hvit_jax.exporting.jax_programs import write_programs
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model
from hvit_jax.models.vit import ViT
from hvit_jax.reducers import warn_without_budgets
from hvit_jax.system.files import checksums, new_folder, refuse_existing, require_space, write_json
from hvit_jax.system.progress import plain_console
from hvit_jax.system.provenance import describe_runtime

FORMAT_VERSION = 1
DESCRIPTION, LOADER = "export.json", "run.py"
MOST_BYTES = 2**31  # of a FlatBuffer, and of a protocol buffer
_TEMPLATES = {"jax": "loader.py", "onnx": "onnx/loader.py"}
_OWN_IMPORTS = re.compile("(from hvit_jax.*\n)+")


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
    onnx = config.format == "onnx"
    if onnx:
        import_optional("onnx", "--format onnx needs onnx: pip install 'hvit-jax[onnx]'")
    checkpoint = config.folder
    description = read_description(checkpoint).at(config.resolution)
    sizes = description.config
    messages = messages or plain_console(stderr=True)
    reducer = choose_method(config.reducer, description, messages.print)
    reducer.resolve(sizes)  # Finds mistakes before the weights are read.
    # An ONNX file has no loops over blocks, so that runtimes see their weights as they are.
    compute = dataclasses.replace(config.compute, attention="xla", unroll=onnx)
    model = build_model(sizes, reducer, fitted_parameters(checkpoint, sizes), compute)
    warn_without_budgets(model.reducer, sizes, messages.print)
    weights = named_weights(model)
    size, inside = sum(array.nbytes for array in weights.values()), config.weights == "inside"
    if inside and size >= most_bytes:
        raise InputError(
            f"{size / 1e9:.1f} GB of weights do not fit inside a program, which may have "
            f"{most_bytes / 1e9:.1f} GB; use --weights beside"
        )
    about = {
        **_describe(model, description, config),
        "checkpoint": str(checkpoint),
        **describe_checkpoint(checkpoint),
    }
    with new_folder(config.output) as folder:
        copies = len(set(config.platforms)) if inside and not onnx else 1
        require_space(config.output, folder, copies * size + 2**20)
        given = (folder, model, weights, description.preprocessing, config)
        if onnx:
            from hvit_jax.exporting.onnx.file import write_onnx

            about |= write_onnx(*given, about)
        else:
            about |= write_programs(*given)
        (folder / LOADER).write_text(_loader_source(config.format), encoding="utf-8")
        about["files"] = checksums(folder)
        write_json(folder / DESCRIPTION, about)
    return about


def _loader_source(format: str) -> str:
    """Write the loader: its template, with the source of what it imports from this package."""
    own = "from types import SimpleNamespace as Preprocessing\n\nInputError = ValueError\n"
    functions = [
        inspect.getsource(function)
        for name, function in inspect.getmembers(preprocess, inspect.isfunction)
        if function.__module__ == preprocess.__name__ and name != "normalize"
    ]
    parts = [own, _body(picture), *functions, _body(classify)]
    template = (Path(__file__).parent / _TEMPLATES[format]).read_text(encoding="utf-8")
    return _OWN_IMPORTS.sub(lambda _: "\n\n".join(parts), template, 1)


def _body(module: ModuleType) -> str:
    """Give a module's source without its first line, and without what it has from here."""
    lines = inspect.getsource(module).splitlines()[1:]
    lines = [line for line in lines if not line.startswith(("from __future__", "from hvit_jax"))]
    return "\n".join(lines).strip() + "\n"


def _describe(model: ViT, description: Description, config: ExportConfig) -> dict[str, Any]:
    decoder = model.config.decoder
    count = model.config.num_classes
    if decoder is not None:
        count = decoder.outputs if decoder.task == "segmentation" else 0
    names = description.classes or map(str, range(count))
    return {
        "format": config.format,
        "format_version": FORMAT_VERSION,
        # The precision of matrix products is part of the programs; the device only made them.
        **describe_runtime(),
        "model": dataclasses.asdict(model.config),
        "method": model.reducer.name,
        "args": model.reducer.options(),
        "dtype": model.dtype.name,
        "attention": "xla",
        "batch": config.rows,
        "input": {
            "dtype": "uint8",
            "resolution": list(model.config.image_shape),
            "channels": "RGB, last",
            "preprocessing": as_json(description.preprocessing),
            "normalised_inside": "by 255, then mean and std",
        },
        "output": _output(model),
        "classes": list(names),
    }


def _output(model: ViT) -> str:
    config = model.config
    if config.decoder is not None:
        of = "depth in metres" if config.decoder.task == "depth" else "logits"
        return f"{of} of every pixel"
    if config.num_classes:
        return "logits"
    if config.projection:
        return "projected features"
    return f"features of {'CLS' if config.pool == 'cls' else config.pool}"
