"""What a run starts with: a checkpoint's sizes and parameters, and pictures to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    read_description,
    resize_parameters,
    trained_with,
)
from hvit_jax.config import Preprocessing
from hvit_jax.data.folder import SPLITS, TEST, TRAIN, first_number
from hvit_jax.data.labels import difference
from hvit_jax.data.source import Source, open_source
from hvit_jax.data.tfds import PREFIX
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, init_parameters
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.trainer import HEADS


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
    sizes = dataclasses.replace(begun.config, num_classes=len(names), projection=0)
    parameters = load_parameters(config.checkpoint, stored)
    heads = {name: parameters.pop(name) for name in HEADS if name in parameters}
    heads, note = _heads(config, description, names, heads)
    parameters |= heads
    if parameters.pop("projection", None) is not None:
        note = f"{note}; its projection to {stored.projection} channels is left out"
    begun = Description(sizes, description.source, names, how)
    return begun, resize_parameters(parameters, stored, sizes), note


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
