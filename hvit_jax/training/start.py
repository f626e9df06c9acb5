"""What a run starts with: a checkpoint's sizes and parameters, and pictures to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    read_description,
    resize_parameters,
)
from hvit_jax.config import Preparing
from hvit_jax.data.folder import SPLITS, TEST, TRAIN, first_number
from hvit_jax.data.labels import difference
from hvit_jax.data.source import Source, open_source
from hvit_jax.data.tfds import PREFIX
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, init_parameters


def from_checkpoint(
    checkpoint: Path,
    classes: Sequence[str],
    *,
    resolution: int | tuple[int, int] | None = None,
    preparing: Preparing = Preparing(),
    new_head: bool = False,
    order: bool = False,
    seed: int = 0,
) -> tuple[Description, Tree, str | None]:
    """Read a checkpoint to be trained on the data's classes.

    Where the checkpoint names all the data's classes, its head keeps their outputs, in the data's
    order. Otherwise it is drawn anew, from the seed, for another number of classes. Both go by
    their order where the checkpoint names no classes, the data's names are the numbers of the
    outputs, or `order` is on.

    Returns:
        The description that the trained model begins with, its parameters, and what a user should
        know of the head.

    Raises:
        InputError: if the checkpoint cannot be read, or as many classes have other names.
    """
    description = read_description(checkpoint)
    stored, names, note = description.config, description.classes, None
    sizes = with_resolution(stored, resolution)
    sizes = dataclasses.replace(sizes, num_classes=len(classes))
    if order and stored.num_classes != len(classes):
        raise InputError(
            f"--order: the data has {len(classes)} classes, the checkpoint's head has "
            f"{stored.num_classes}"
        )
    parameters = load_parameters(checkpoint, stored)
    if not new_head and not order and set(classes) <= set(names):
        places = {name: place for place, name in enumerate(names)}
        kept, head = [places[name] for name in classes], parameters["head"]
        parameters["head"] = {name: leaf[..., kept] for name, leaf in head.items()}
        if len(classes) < len(names):
            note = (
                f"the head keeps its outputs for the data's {len(classes)} classes, of "
                f"{len(names)} (--new-head starts with a new one)"
            )
    elif new_head or stored.num_classes != len(classes):
        smallest = dataclasses.replace(sizes, depth=1, resolution=sizes.patch_size)
        parameters["head"] = init_parameters(smallest, seed)["head"]
        note = f"a new head for {len(classes)} classes; the checkpoint has {stored.num_classes}"
    elif not names or order or first_number(classes) == 0:
        note = (
            f"the head's outputs are taken for the data's classes in their order, {classes[0]} to "
            f"{classes[-1]} (--new-head starts with a new one)"
        )
    else:
        raise InputError(
            f"the data's class names are not the checkpoint's{difference(classes, names)}; "
            "--new-head starts with a new head, --order takes both in their order"
        )
    preprocessing = preparing.changed(description.preprocessing)
    begun = Description(sizes, classes=tuple(classes), preprocessing=preprocessing)
    return begun, resize_parameters(parameters, stored, sizes), note


def find_validation(
    data: str, val: str | None, classes: Sequence[str], *, exif: bool
) -> tuple[Source | None, list[str]]:
    """Open the pictures to validate on; by default those of `val/` or the like beside `train/`.

    A test set is for the end, not for choosing among runs: only `val` can name it.

    Returns:
        The pictures, if there are any, and what a user should know of them.

    Raises:
        InputError: if they cannot be opened, or have other classes.
    """
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
    source = open_source(val or data, exif=exif)
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
