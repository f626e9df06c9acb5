"""Conversion of checkpoints: from PyTorch's files, and back, each proven by comparing numbers.

Weights pass through one array at a time, so that a file larger than memory can be converted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hvit_jax.architectures import ACTIVATIONS, architecture_config
from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    origin_of,
    parse_description,
    read_description,
    save_checkpoint,
)
from hvit_jax.config import ViTConfig
from hvit_jax.convert.configs import read_facts
from hvit_jax.convert.dense_layouts import HEAD
from hvit_jax.convert.describing import describe
from hvit_jax.convert.detect import Found, detect
from hvit_jax.convert.facts import Facts
from hvit_jax.convert.heads import join_head
from hvit_jax.convert.keys import PERIODS, Entry, Form, depths_of
from hvit_jax.convert.layouts import LAYOUTS, WRITTEN
from hvit_jax.convert.reader import OWN, StateDict, import_torch, read_state_dict
from hvit_jax.convert.switches import Stated
from hvit_jax.errors import InputError, first_line, unknown
from hvit_jax.fields import flag
from hvit_jax.models.parameters import Tree, abstract_parameters, flatten
from hvit_jax.system.files import new_file, refuse_existing, require_space

_SILENT = Progress(disable=True)
# Of the files that `export_file` writes: all but the last are those of `torch.save`.
ENDINGS = (".torch", ".pth", ".pt", ".bin", ".safetensors")
# What an architecture's name says that keys and shapes do not, and sizes, to be compared.
_OF_ARCHITECTURE = (
    *("heads", "activation", "norm_eps", "rope", "pool", "pool_heads", "pool_prefix"),
    *("depth", "width", "mlp_width", "patch_size"),
)

# What our own files say of a decoder that its arrays do not.
_OF_DECODER = ("taps", "heads", "norm_eps", "depth_range", "restore")


def convert_file(
    source: str | Path,
    destination: str | Path,
    *,
    heads: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    activation: str | None = None,
    architecture: str | None = None,
    entry: str | None = None,
    preprocessing: str | None = None,
    norm_eps: float | None = None,
    position_resizing: str | None = None,
    head: str | Path | None = None,
    taps: tuple[int, ...] | None = None,
    depth_range: tuple[float, float] | None = None,
    progress: Progress = _SILENT,
) -> Description:
    """Convert weights of a plain vision transformer to a checkpoint that `hvit_jax.load` reads.

    Args:
        source: a folder as the Hugging Face hub has it, or a file of weights, in one of the layouts
            in `hvit_jax.convert.layouts`.
        destination: the folder to write; must not exist.
        heads: attention heads; None: as the folder's files or `export_file` wrote, or else those
            that are usual for the width.
        resolution: height and width in pixels; None: as written there, or a square.
        activation: of the MLPs, as timm or transformers names it; None: as written there, or the
            usual one.
        architecture: timm's name of the model, which tells what a bare file does not.
        entry: which model, of a file that holds several, such as "model"; None: averaged weights
            (such as "model_ema") before others.
        preprocessing: a name in `hvit_jax.convert.families.PREPROCESSING`; None: as written there,
            or as the family, the resolution and the file's name tell.
        norm_eps: added to variances by the norms of the backbone; None: as written there, or as
            usual for the layout.
        position_resizing: the rule by which positions are fitted to other grids, as `ViTConfig`
            names it; None: the layout's.
        head: a file with a head of DINOv2's that makes maps, beside the backbone in `source`.
        taps: the blocks that it reads, from 0; None: as usual for the depth.
        depth_range: least and largest depth in metres, of heads that estimate it; None: as
            published, by the file's name.
        progress: shows how far it is.

    Returns:
        What was written to `model.json`. Its `source` says what was passed over and assumed.

    Raises:
        InputError: if the source is no whole and healthy model of a known layout, contradicts
            itself or an option, or if the destination exists or cannot be written.
    """
    refuse_existing(destination)
    source = Path(source)
    facts = read_facts(source) if source.is_dir() else None
    read = read_state_dict(source, progress, entry)
    own = _own_description(read)
    if head is not None:
        read = join_head(read, read_state_dict(Path(head), progress))
    if activation is not None:
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        activation = ACTIVATIONS[activation]
    options = {"heads": heads, "resolution": resolution, "activation": activation}
    options |= {"norm_eps": norm_eps, "position_resizing": position_resizing}
    of_head = {"taps": taps, "depth_range": depth_range}
    found = detect(read, _stated(facts, own, architecture, options, of_head), progress)
    description = describe(read, source.name, found, facts, own, preprocessing)
    progress.add_task("writing", total=None)
    save_checkpoint(destination, functools.partial(fill_parameters, read, found), description)
    return description


def _stated(
    facts: Facts | None,
    own: Description | None,
    architecture: str | None,
    options: dict[str, Any],
    of_head: dict[str, Any],
) -> Stated:
    """Gather what is known of a model beside its weights; what comes later wins."""
    switches, where, usual = {}, {}, {}
    if facts is not None:
        switches |= facts.switches
        where |= dict.fromkeys([*switches, "layout"], facts.file)
    if own is not None:
        switches |= vars(own.config)
        del switches["num_classes"]  # A head may have been replaced in PyTorch.
        decoder = vars(own.config.decoder) if own.config.decoder else {}
        switches["decoder"] = {name: decoder[name] for name in _OF_DECODER if decoder.get(name)}
        where |= dict.fromkeys(switches, "what hvit_jax wrote beside the weights")
    if architecture is not None:
        named = vars(architecture_config(architecture))
        switches |= {name: named[name] for name in _OF_ARCHITECTURE}
        where |= dict.fromkeys(_OF_ARCHITECTURE, f"--architecture {architecture}")
        usual["resolution"] = named["resolution"]
    for name, value in options.items():
        if value is not None:
            switches[name], where[name] = value, flag(name)
    given = {name: value for name, value in of_head.items() if value is not None}
    switches["decoder"] = {**(switches.get("decoder") or {}), **given}
    where |= {name: flag(name) for name in given}
    return Stated(switches, where, facts.layout if facts else None, usual)


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


def fill_parameters(read: StateDict, found: Found, folder: Path) -> Tree:
    """Read a model's parameters, one array of the file at a time.

    Args:
        read: the file.
        found: the model in it.
        folder: an empty one, for a file for each of our arrays, which is mapped into memory.

    Returns:
        The arrays, in float32; each has been proven to give the file's back.
    """
    abstract = abstract_parameters(found.config)
    arrays = []
    for path, leaf in flatten(abstract).items():
        file = folder / f"{path.replace('/', '.')}.npy"
        array = np.lib.format.open_memmap(file, "w+", np.float32, leaf.shape)
        rows = [row for row in found.rows if row.path == path]
        _fill_leaf(read, found, rows, array)
        arrays.append(array)
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _fill_leaf(
    read: StateDict, found: Found, rows: list[Entry], leaf: Float32[np.ndarray, "*shape"]
) -> None:
    """Fill one of our arrays, and prove that the rows' own come back from it bit for bit."""
    form, masked = found.form, any(row.mask for row in rows)
    blocks = leaf if rows[0].stack else leaf[None]
    for number, block in enumerate(blocks):
        for row in rows:
            value = read.read(form.key(row, number))
            if row.mask:
                block *= np.where(np.isnan(value), _mask(value.size), value)
                block += 0  # What was -0 is 0 from now on.
            else:
                row.place(block)[...] = row.transform.to_ours(value)
    for number, block in enumerate(blocks):
        for row in rows if not masked else ():
            value = read.read(key := form.key(row, number))
            if _bits(row.transform.to_torch(row.place(block))) != _bits(value):
                raise RuntimeError(f"{key} does not survive conversion; please report this defect")
    if rows[0].path == "blocks/in_proj/bias" and found.config.qkv_bias == "qv":
        _refuse_key_bias(read.name, leaf)


def _bits(array: Float32[np.ndarray, "*shape"]) -> tuple[tuple[int, ...], bytes]:
    return array.shape, array.tobytes()


def _mask(size: int) -> Float32[np.ndarray, "*biases"]:
    """Make the mask of DINOv3's biases: those of q and v count, those of k do not."""
    return np.repeat(np.array([1, 0, 1], np.float32), size // 3)


def _refuse_key_bias(name: str, biases: Float32[np.ndarray, "depth biases"]) -> None:
    if np.split(biases, 3, axis=-1)[1].any():
        raise InputError(
            f"{name} has biases of the keys that are not 0, where this layout has none"
        )


def export_file(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    layout: str | None = None,
    head: str | Path | None = None,
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
        layout: whose keys to use, a name in `hvit_jax.convert.layouts.WRITTEN`; None: those of the
            file that the checkpoint, or the one it was trained from, was converted from.
        head: a second file, for the head of a model that makes maps; None: it stands beside the
            backbone.
        progress: shows how far it is.

    Returns:
        The checkpoint's description.

    Raises:
        InputError: if the checkpoint is missing or damaged or holds NaN or infinite numbers, the
            layout has no place for something in it, or the destination exists, has another ending
            or cannot be written.
    """
    files = [Path(destination)] if head is None else [Path(destination), Path(head)]
    for file in files:
        refuse_existing(file)
        if file.suffix.lower() not in ENDINGS:
            endings = ", ".join(ENDINGS)
            raise InputError(f"a PyTorch file takes a name that ends in {endings}, got {file}")
    description = read_description(checkpoint)
    form = form_of(description, layout)
    source = {name: each for name, each in origin_of(description).items() if name == "licence"}
    about = json.dumps({**dataclasses.asdict(description), "source": source})
    parameters = load_parameters(checkpoint, description.config)
    _refuse_unplaced(str(checkpoint), form, description.config, flatten(parameters))
    state = {
        key: np.ascontiguousarray(each)
        for key, each in to_state(parameters, form, description.config)
    }
    own = {key: state.pop(key) for key in [*state] if head is not None and key.startswith(HEAD)}
    if head is not None and not own:
        raise InputError(
            f"{checkpoint} has no head that stands beside its backbone in the layout of "
            f"{form.layout.name}; leave out --head"
        )
    in_file = functools.partial(form.in_file, depth=description.config.depth)
    for file, part in zip(files, (state, own), strict=False):
        _write(file, part, in_file, about, progress)
    return description


def _write(
    destination: Path,
    state: dict[str, Float32[np.ndarray, "*shape"]],
    in_file: Callable[[str], str],
    about: str,
    progress: Progress,
) -> None:
    """Write one file, its keys as `in_file` has them, and prove that it holds all."""
    torch = None if destination.suffix.lower() == ".safetensors" else import_torch()
    with new_file(destination) as temporary:
        require_space(destination, temporary.parent, sum(array.nbytes for array in state.values()))
        progress.add_task("writing", total=None)
        try:
            _save(temporary, {in_file(key): state[key] for key in state}, about, torch)
        except (RuntimeError, SafetensorError) as error:  # torch's writer reports a full disk so.
            raise InputError(f"cannot write {destination}: {first_line(error)}") from error
        _read_back(temporary, state, progress)


def form_of(description: Description, layout: str | None) -> Form:
    """Find the keys to write a checkpoint with.

    Args:
        description: the checkpoint's.
        layout: a name in `WRITTEN`; None: that of the file that it comes from, or SWAG's.

    Raises:
        InputError: for an unknown name.
    """
    if layout is not None and layout not in WRITTEN:
        raise unknown("layout", layout, WRITTEN)
    source = origin_of(description)
    origin = {each.name: each for each in LAYOUTS}.get(source.get("format", ""))
    wanted = WRITTEN[layout] if layout else origin or WRITTEN["swag"]
    if wanted == origin:
        return Form.from_json(wanted, source.get("form", {}))
    return Form.usual(wanted).fitted(description.config)


def _refuse_unplaced(name: str, form: Form, config: ViTConfig, leaves: dict[str, Any]) -> None:
    """Refuse a model that a layout cannot hold."""
    layout, rows = form.layout, form.rows(leaves, config.qkv_bias)
    fixed = [
        f"{switch} {getattr(config, switch)!r}, not {value!r}"
        for switch, value in layout.switches.items()
        if getattr(config, switch) != value
    ]
    unplaced = sorted(leaves.keys() - {row.path for row in rows})
    if fixed or unplaced:
        raise InputError(
            f"{name} cannot be written in the layout of {layout.name}, which has no place for: "
            + ", ".join([*unplaced, *fixed])
        )
    if config.qkv_bias == "qv" and "blocks/in_proj/bias" in leaves:
        _refuse_key_bias(name, leaves["blocks/in_proj/bias"])


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
    path: Path, state: dict[str, Float32[np.ndarray, "*shape"]], progress: Progress
) -> None:
    """Prove that a file holds a state dict."""
    read = read_state_dict(path, progress)
    if read.shapes.keys() != state.keys():
        raise RuntimeError("keys do not survive writing; please report this defect")
    for key, array in progress.track(state.items(), description="checking numbers"):
        if _bits(read.read(key)) != _bits(array):
            raise RuntimeError(f"{key} does not survive writing; please report this defect")


def to_state(
    parameters: Tree, form: Form, config: ViTConfig
) -> Iterator[tuple[str, Float32[np.ndarray, "*shape"]]]:
    """Arrange our tree as a state dict, array by array, in the order of PyTorch's own."""
    leaves = flatten(parameters)
    rows = form.rows(leaves, config.qkv_bias)
    for key, row, number in form.expected(rows, depths_of(config)):
        if row.path == PERIODS:
            array = np.array(config.rope.periods if config.rope else (), np.float32)
        else:
            leaf = leaves[row.path][number] if row.stack else leaves[row.path]
            array = row.transform.to_torch(row.place(leaf))
            if row.mask:  # As in published files, where all biases are 0.
                array = _mask(array.size) if array.any() else np.zeros_like(array)
        yield key, array
