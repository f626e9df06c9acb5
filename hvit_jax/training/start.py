"""What a run starts with: a checkpoint's sizes and parameters, and pictures to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    read_description,
    resize_parameters,
    trained_with,
)
from hvit_jax.config import Decoder, ViTConfig
from hvit_jax.data.folder import SPLITS, TEST, TRAIN, first_number
from hvit_jax.data.labels import difference
from hvit_jax.data.source import Source, open_source
from hvit_jax.data.tfds import PREFIX
from hvit_jax.dense.folders import Scenes, open_scenes
from hvit_jax.dense.metrics import IGNORED, class_names
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, abstract_parameters, init_parameters
from hvit_jax.pictures import Preprocessing
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.trainer import HEADS


@dataclass(frozen=True)
class Data:
    """What a run learns from.

    Attributes:
        pictures: those that it trains on; scenes: the pixels have the classes.
        classes: their names.
        held_out: the pictures to validate on, if there are any.
        notes: what a user should know.
    """

    pictures: Source | Scenes
    classes: tuple[str, ...]
    held_out: Source | Scenes | None
    notes: list[str]


def open_data(config: TrainConfig) -> Data:
    """Open the pictures of a run.

    Raises:
        InputError: if they cannot be opened, or have too few classes, or classes that differ.
    """
    if config.task == "segmentation":
        return _open_scenes(config)
    pictures = open_source(config.data, TRAIN, exif=config.preparing.exif)
    if len(pictures.classes) == 1:
        raise InputError(
            f"{config.data} has one class, {pictures.classes[0]}; training needs at least two "
            "(class folders lie right below DATA, or below its train/)"
        )
    held_out, notes = find_validation(config, pictures.classes)
    return Data(pictures, pictures.classes, held_out, [*pictures.notes, *notes])


def _open_scenes(config: TrainConfig) -> Data:
    """Do what `open_data` does for pictures whose pixels have classes."""
    how: dict[str, Any] = {**vars(config.labelled), "exif": config.preparing.exif}
    del how["split"]
    pictures = open_scenes(config.data, split="train", **how)
    if not pictures.truths:
        raise InputError("--truth none: training needs the truth of its pictures")
    held_out = None
    if config.val is None:
        held_out = open_scenes(config.data, split="val", **how)
        folders = {part.lower() for part in Path(held_out.paths[0]).parent.parts}
        if held_out.paths == pictures.paths or folders & {*TEST}:
            held_out = None
    elif config.val != "none":
        held_out = open_scenes(config.val, split="val", **{**how, "truth": None})
    return Data(pictures, _class_names(pictures), held_out, [])


def _class_names(scenes: Scenes) -> tuple[str, ...]:
    """Name the classes of pixels: by `classes.txt`, a name a line, or by their numbers.

    Without either a known data set or this file, they are counted in the truth of all pictures.
    """
    listed = scenes.root / "classes.txt"
    if listed.is_file() and scenes.outputs is None:
        lines = listed.read_text(encoding="utf-8").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        if len({*names}) != len(names):
            raise InputError(f"{listed} names a class twice")
        return names
    count = scenes.outputs or 0
    for name in scenes.truths if not count else ():
        labels = scenes.kind.read(scenes.root / name, name)
        count = max(count, 1 + int(labels[labels != IGNORED].max(initial=-1)))
    if count < 2:
        raise InputError(f"the labels of {scenes.root} are of {count} class; training needs two")
    return class_names(count, ())


def begin(config: TrainConfig, classes: Sequence[str]) -> tuple[Description, Tree, str | None]:
    """Describe the model that a run on the data's classes begins with; give its parameters.

    Where a checkpoint names all the data's classes, its head keeps their outputs, in the data's
    order. Otherwise it is drawn anew, from the seed, for another number of classes. Both go by
    their order where the checkpoint names no classes, the data's names are the numbers of the
    outputs, or `--order` is given. A checkpoint without a head gets one on its pooled feature; the
    projection that CLIP has there is left out.

    Returns:
        The description, the parameters, and what a user should know of the head.

    Raises:
        InputError: if the checkpoint cannot be read, or as many classes have other names.
    """
    names = tuple(classes)
    if config.task == "segmentation":
        return _begin_map(config, names)
    if config.checkpoint is None:
        sizes, how = config.new_model(len(names)), config.preparing.changed(Preprocessing())
        begun = Description(sizes, classes=names, preprocessing=how)
        return begun, init_parameters(sizes, config.seed), None
    description = read_description(config.checkpoint)
    stored, begun = description.config, description.at(config.resolution)
    how = config.preparing.changed(begun.preprocessing)
    if config.order and stored.num_classes != len(names):
        raise InputError(
            f"--order: the data has {len(names)} classes, the checkpoint's head has "
            f"{stored.num_classes}"
        )
    sizes = dataclasses.replace(begun.config, num_classes=len(names), projection=0, decoder=None)
    parameters = load_parameters(config.checkpoint, stored)
    if parameters.pop("decoder", None) is not None:  # Its classes are those of pixels.
        description = dataclasses.replace(description, classes=())
    heads = {name: parameters.pop(name) for name in HEADS if name in parameters}
    heads, note = _heads(config, description, names, heads)
    parameters |= heads
    if parameters.pop("projection", None) is not None:
        note = f"{note}; its projection to {stored.projection} channels is left out"
    begun = Description(sizes, description.source, names, how)
    return begun, resize_parameters(parameters, stored, sizes), note


def _begin_map(
    config: TrainConfig, classes: tuple[str, ...]
) -> tuple[Description, Tree, str | None]:
    """Do what `begin` does for a model that makes maps: a backbone and a decoder.

    A checkpoint's decoder is kept if it is of the kind that is asked for, and has the data's
    classes; otherwise it is drawn anew.
    """
    if config.checkpoint is None:
        sizes = _with_decoder(config.new_model(0), config.decoder, len(classes))
        begun = Description(sizes, classes=classes, windows=config.windows)
        return begun, init_parameters(sizes, config.seed), None
    description = read_description(config.checkpoint)
    stored, begun = description.config, description.at(config.resolution)
    kept = not config.new_head and _keeps_decoder(config, description, classes)
    if config.distill and not kept:
        raise _cannot_teach(config.decoder + " decoder", classes)
    sizes = begun.config
    sizes = sizes if kept else _with_decoder(sizes, config.decoder, len(classes))
    parameters = load_parameters(config.checkpoint, stored)
    parameters = resize_parameters(parameters, stored, sizes)
    if not kept:  # As part of a whole model, of which the rest is not computed.
        draw = jax.jit(lambda: init_parameters(sizes, config.seed)["decoder"])
        parameters["decoder"] = draw()
    parameters = {name: parameters[name] for name in abstract_parameters(sizes)}
    # Windows are of the resolution; a stride belongs to the one that the model had.
    stride = begun.windows.stride if begun is description else None
    windows = dataclasses.replace(begun.windows, window=None, stride=stride)
    windows = config.windows.over(windows)
    begun = dataclasses.replace(begun, config=sizes, classes=classes, windows=windows)
    note = f"a new {config.decoder} decoder for {len(classes)} classes"
    return begun, parameters, None if kept else note


def _with_decoder(sizes: ViTConfig, kind: str, classes: int) -> ViTConfig:
    """Put a decoder in place of what a model makes of its pooled feature."""
    decoder = Decoder(kind, classes)
    if kind == "mask":  # As Segmenter's published models for ADE20K have it.
        decoder = Decoder(kind, classes, depth=2, heads=sizes.heads)
    none: dict[str, Any] = {"num_classes": 0, "projection": 0, "pooled_norm": False}
    pool = "cls" if sizes.class_token else "avg"
    return dataclasses.replace(sizes, **none, pool=pool, decoder=decoder)


def _keeps_decoder(config: TrainConfig, description: Description, classes: tuple[str, ...]) -> bool:
    """Tell whether a checkpoint's decoder suits; see `_begin_map`."""
    decoder, names = description.config.decoder, description.classes
    if decoder is None or (decoder.kind, decoder.outputs) != (config.decoder, len(classes)):
        if config.order:
            raise InputError(
                f"--order: the checkpoint has no {config.decoder} decoder of {len(classes)} classes"
            )
        return False
    if names and names != classes and first_number(classes) != 0 and not config.order:
        raise InputError(
            f"the data's class names are not the checkpoint's{difference(classes, names)}; "
            "--new-head starts with a new decoder, --order takes both in their order"
        )
    return True


def _heads(
    config: TrainConfig, description: Description, classes: Sequence[str], heads: Tree
) -> tuple[Tree, str | None]:
    """Make the heads for the data's classes of a checkpoint's, and say what a user should know."""
    sizes, names = description.config, description.classes
    if not config.new_head and not config.order and set(classes) <= set(names):
        places = {name: place for place, name in enumerate(names)}
        kept = [places[name] for name in classes]
        fewer = (
            f"the head keeps its outputs for the data's {len(classes)} classes, of {len(names)} "
            "(--new-head starts with a new one)"
        )
        note = fewer if len(classes) < len(names) else None
        return jax.tree.map(lambda leaf: leaf[..., kept], heads), note
    if config.new_head or sizes.num_classes != len(classes):
        if config.distill:
            raise _cannot_teach("head", classes)
        smallest = dataclasses.replace(
            sizes, depth=1, resolution=sizes.patch_size, num_classes=len(classes), projection=0
        )
        before = sizes.num_classes or "none"
        note = f"a new head for {len(classes)} classes; the checkpoint has {before}"
        drawn = init_parameters(smallest, config.seed)
        return {name: drawn[name] for name in HEADS if name in drawn}, note
    if not names or config.order or first_number(classes) == 0:
        note = (
            f"the head's outputs are taken for the data's classes in their order, {classes[0]} to "
            f"{classes[-1]} (--new-head starts with a new one)"
        )
        return heads, note
    raise InputError(
        f"the data's class names are not the checkpoint's{difference(classes, names)}; "
        "--new-head starts with a new head, --order takes both in their order"
    )


def _cannot_teach(end: str, classes: Sequence[str]) -> InputError:
    return InputError(
        f"--distill: the checkpoint has no {end} for the data's {len(classes)} classes, so its "
        "dense model cannot teach them; train that on them first"
    )


def name_method_before(config: TrainConfig) -> list[str]:
    """Name the method that the checkpoint was trained with, which a run does not take over."""
    description = config.checkpoint and read_description(config.checkpoint)
    before = description and trained_with(description)
    if not before:
        return []
    return [f"the checkpoint was trained with {before}; this run trains with {config.reducer.name}"]


def find_validation(config: TrainConfig, classes: Sequence[str]) -> tuple[Source | None, list[str]]:
    """Open the pictures to validate on; by default those of `val/` or the like beside `train/`.

    A test set is for the end, not for choosing among runs: only `val` can name it.

    Returns:
        The pictures, if there are any, and what a user should know of them.

    Raises:
        InputError: if they cannot be opened, or have other classes.
    """
    data, val = config.data, config.val
    if val == "none" or (val is None and data.startswith(PREFIX)):
        return None, []
    if val is None:
        beside = {each.name.lower(): each.name for each in Path(data).iterdir() if each.is_dir()}
        splits = [name for name in SPLITS if name in beside]
        if not splits or not beside.keys() & set(TRAIN):
            return None, []
        if splits[0] in TEST:
            test = beside[splits[0]]
            return None, [
                f"no validation: {test}/ is for the end (--val {Path(data, test)} uses it)"
            ]
    source = open_source(val or data, exif=config.preparing.exif)
    if set(source.classes) != set(classes):
        raise InputError(
            f"the classes of the validation pictures ({_names(source.classes, classes)}) "
            f"are not those of training ({_names(classes, source.classes)}); "
            "--val none trains without validation"
        )
    return source, list(source.notes)


def _names(classes: Sequence[str], others: Sequence[str]) -> str:
    alone = sorted(set(classes) - set(others))
    more = ", ..." if len(alone) > 3 else ""
    return f"{len(classes)}, only here: {', '.join(alone[:3]) or 'none'}{more}"
