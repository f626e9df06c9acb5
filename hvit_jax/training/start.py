"""What a run starts with: a checkpoint's sizes and parameters, and pictures to validate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import load_parameters, read_description, resize_parameters
from hvit_jax.config import ViTConfig
from hvit_jax.data.folder import SPLITS, read_folder
from hvit_jax.data.source import Source, open_source
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, init_parameters


def from_checkpoint(
    checkpoint: Path,
    classes: Sequence[str],
    *,
    resolution: int | tuple[int, int] | None,
    new_head: bool,
    seed: int,
) -> tuple[ViTConfig, Tree, str | None]:
    """Read a checkpoint to be trained on the data's classes.

    Its head is drawn anew, from the seed, for another number of classes or with `new_head`. One for
    the data's classes in another order has its outputs change places.

    Returns:
        The model's sizes, its parameters, and what a user should know of the head.
    """
    description = read_description(checkpoint)
    stored, names, note = description.config, description.classes, None
    sizes = with_resolution(stored, resolution)
    sizes = dataclasses.replace(sizes, num_classes=len(classes))
    parameters = load_parameters(checkpoint, stored)
    if new_head or stored.num_classes != len(classes):
        smallest = dataclasses.replace(sizes, depth=1, resolution=sizes.patch_size)
        parameters["head"] = init_parameters(smallest, seed)["head"]
        note = f"a new head for {len(classes)} classes; the checkpoint has {stored.num_classes}"
    elif set(classes) == set(names):
        places = [names.index(name) for name in classes]
        head = parameters["head"]
        parameters["head"] = {name: leaf[..., places] for name, leaf in head.items()}
    else:
        note = (
            "the data's class names are not the checkpoint's; the head's go by their order "
            "(--new-head draws it anew)"
        )
    return sizes, resize_parameters(parameters, stored, sizes), note


def find_validation(data: str, val: str | None, classes: Sequence[str]) -> Source | None:
    """Open the pictures to validate on, if any: by default `val/` or `img_val/` beside `train/`."""
    source = None
    if val is None:
        train, *others = ((Path(data) / split).is_dir() for split in ("train", *SPLITS))
        if train and any(others):
            source = read_folder(data)
    elif val != "none":
        source = open_source(val)
    if source is not None and set(source.classes) != set(classes):
        raise InputError(
            f"the classes of the validation pictures ({_names(source.classes, classes)}) "
            f"are not those of training ({_names(classes, source.classes)}); "
            "--val none trains without validation"
        )
    return source


def _names(classes: Sequence[str], others: Sequence[str]) -> str:
    alone = sorted(set(classes) - set(others))
    more = ", ..." if len(alone) > 3 else ""
    return f"{len(classes)}, only here: {', '.join(alone[:3]) or 'none'}{more}"
