"""The two conversions, from a file to a checkpoint and back, by the tables in `keys`."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    parse_description,
    read_description,
    save_checkpoint,
)
from hvit_jax.config import ViTConfig
from hvit_jax.convert.detect import config_of, detect, expected_keys, preprocessing_of
from hvit_jax.convert.keys import WRITTEN, Layout
from hvit_jax.convert.reader import OWN, StateDict, import_torch, read_state_dict
from hvit_jax.errors import InputError, first_line, unknown
from hvit_jax.models.parameters import Tree, flatten
from hvit_jax.system.files import new_file, refuse_existing, require_space

_SILENT = Progress(disable=True)
# Of the files that `export_file` writes: all but the last are those of `torch.save`.
ENDINGS = (".torch", ".pth", ".pt", ".bin", ".safetensors")


def convert_file(
    source: str | Path,
    destination: str | Path,
    *,
    heads: int | None = None,
    grid: tuple[int, int] | None = None,
    entry: str | None = None,
    preprocessing: str | None = None,
    progress: Progress = _SILENT,
) -> Description:
    """Convert a PyTorch file to a checkpoint that `hvit_jax.load` reads.

    Args:
        source: a `.torch`, `.pth` or `.safetensors` file in SWAG's or torchvision's layout.
        destination: the folder to write; must not exist.
        heads: attention heads; None: as `export_file` wrote, or those of the published size.
        grid: rows and columns of patches; None: as `export_file` wrote, or as many of each.
        entry: which model, of a file that holds several, such as "model"; None: averaged weights
            (such as "model_ema") before others.
        preprocessing: "swag" or "torchvision"; None: as `export_file` wrote, or as the layout, the
            resolution and the file's name tell. The description's source says if it was assumed.
        progress: shows how far it is.

    Returns:
        What was written to `model.json`.

    Raises:
        InputError: if the file is no whole and healthy checkpoint of a known format, or if the
            destination exists or cannot be written.
    """
    refuse_existing(destination)
    read = read_state_dict(Path(source), progress, entry)
    layout, sizes = detect(read)
    own = _own_description(read)
    if own is not None:
        heads = own.config.heads if heads is None else heads
        grid = grid or own.config.grid
    config = config_of(read.name, sizes, heads, grid)
    parameters = _to_tree(read.arrays, layout, config.depth)
    _check(to_state(parameters, layout), read.arrays)
    description = _describe(read, Path(source).name, layout, config, own, preprocessing)
    progress.add_task("writing", total=None)
    save_checkpoint(destination, parameters, description)
    return description


def _describe(
    read: StateDict,
    file: str,
    layout: Layout,
    config: ViTConfig,
    own: Description | None,
    preprocessing: str | None,
) -> Description:
    """Say where a model came from, what was left out or assumed, and how pictures are prepared."""
    name, prepared = preprocessing_of(preprocessing, file, layout, config)
    source = {"file": file, "sha256": read.sha256, "format": layout.name, **read.said}
    if own is None and preprocessing is None and layout.preprocessing != "swag":
        source["assumed"] = f"preprocessing of {name}"
    if own is None:
        return Description(config, source, preprocessing=prepared)
    classes = own.classes if own.config.num_classes == config.num_classes else ()
    return Description(config, source, classes, prepared if preprocessing else own.preprocessing)


def _own_description(read: StateDict) -> Description | None:
    """Read what `export_file` wrote beside the weights; None in all other files."""
    if not read.own:
        return None
    try:
        return parse_description(json.loads(read.own))
    except (InputError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{read.name}: what hvit_jax wrote beside the weights is damaged: {first_line(error)}"
        ) from error


def _check(
    back: Iterable[tuple[str, Float32[np.ndarray, "*shape"]]],
    state: dict[str, Float32[np.ndarray, "*shape"]],
) -> None:
    """Prove that a state dict equals another bit for bit, and that each key was used once."""
    remaining = dict(state)
    for key, array in back:
        before = remaining.pop(key)
        if array.shape != before.shape or array.tobytes() != before.tobytes():
            raise RuntimeError(f"{key} does not survive the conversion; please report this defect")
    if remaining:
        raise RuntimeError(f"not used: {sorted(remaining)}; please report this defect")


def export_file(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    layout: str = "swag",
    progress: Progress = _SILENT,
) -> Description:
    """Write a checkpoint, converted or fine-tuned, as a state dict for PyTorch.

    The file is read back and compared before it takes its name. Beside the weights it holds the
    sizes, classes and preprocessing, which PyTorch ignores and `convert_file` reads.

    Args:
        checkpoint: a folder that `hvit_jax.load` reads.
        destination: the file to write, in float32; must not exist. By its ending it is one of
            `torch.save` (`.torch`, `.pth`, `.pt`, `.bin`) or `.safetensors`, which needs no
            PyTorch.
        layout: whose keys to use, "swag" or "torchvision".
        progress: shows how far it is.

    Returns:
        The checkpoint's description.

    Raises:
        InputError: if the checkpoint is missing or damaged or holds NaN or infinite numbers, or the
            destination exists, has another ending or cannot be written.
    """
    refuse_existing(destination)
    if (ending := Path(destination).suffix.lower()) not in ENDINGS:
        endings = ", ".join(ENDINGS)
        raise InputError(f"a PyTorch file takes a name that ends in {endings}, got {destination}")
    if layout not in WRITTEN:
        raise unknown("layout", layout, WRITTEN)
    description = read_description(checkpoint)
    torch = None if ending == ".safetensors" else import_torch()
    about = json.dumps({**dataclasses.asdict(description), "source": {}})
    parameters = load_parameters(checkpoint, description.config)
    state = {key: np.ascontiguousarray(each) for key, each in to_state(parameters, WRITTEN[layout])}
    with new_file(destination) as temporary:
        require_space(destination, temporary.parent, sum(array.nbytes for array in state.values()))
        progress.add_task("writing", total=None)
        try:
            _save(temporary, state, about, torch)
        except (RuntimeError, SafetensorError) as error:  # torch's writer reports a full disk so.
            raise InputError(f"cannot write {destination}: {first_line(error)}") from error
        _read_back(temporary, checkpoint, state, progress)
    return description


def _save(
    path: Path, state: dict[str, Float32[np.ndarray, "*shape"]], about: str, torch: Any
) -> None:
    """Write a state dict as PyTorch's, or as safetensors without PyTorch."""
    if torch is None:
        save_file(state, path, {"format": "pt", OWN: about})
        return
    tensors: Any = OrderedDict((key, torch.from_numpy(array)) for key, array in state.items())
    tensors._metadata = {"": {OWN: about}}
    with path.open("wb") as file:  # torch's own files hide the system's reason.
        torch.save(tensors, file)


def _read_back(
    path: Path,
    checkpoint: str | Path,
    state: dict[str, Float32[np.ndarray, "*shape"]],
    progress: Progress,
) -> None:
    """Prove that a file holds a state dict; what is wrong with it is the checkpoint's fault."""
    read = dataclasses.replace(read_state_dict(path, progress), name=str(checkpoint))
    detect(read)
    _check(read.arrays.items(), state)


def _to_tree(state: dict[str, Float32[np.ndarray, "*shape"]], layout: Layout, depth: int) -> Tree:
    """Arrange a state dict as our tree; it must be whole, as `detect` checks."""
    tree: dict[str, Any] = {}
    for entry in layout.entries:
        if entry.stacked:
            keys = [layout.key(entry, number) for number in range(depth)]
            array = np.stack([entry.transform.to_ours(state[key]) for key in keys])
        elif (key := layout.key(entry)) in state:
            array = np.ascontiguousarray(entry.transform.to_ours(state[key]))
        else:
            continue
        *folders, leaf = entry.path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = array
    return tree


def to_state(
    parameters: Tree, layout: Layout
) -> Iterator[tuple[str, Float32[np.ndarray, "*shape"]]]:
    """Arrange our tree as a state dict, array by array, in the order of PyTorch's own."""
    leaves = flatten(parameters)
    sizes = {"depth": len(leaves["blocks/ln_1/scale"]), "K": int("head/kernel" in leaves)}
    blocks = {path: iter(leaf) for path, leaf in leaves.items() if path.startswith("blocks/")}
    for key, entry in expected_keys(layout, sizes):
        leaf = next(blocks[entry.path]) if entry.stacked else leaves[entry.path]
        yield key, entry.transform.to_torch(leaf)
