"""Where a run starts: the model's sizes and its parameters before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import load_parameters, read_description, resize_parameters
from hvit_jax.config import ViTConfig, named_config
from hvit_jax.models.parameters import Tree, init_parameters
from hvit_jax.training.config import TrainConfig


def first_parameters(
    config: TrainConfig, classes: Sequence[str]
) -> tuple[ViTConfig, Tree, str | None]:
    """Find the model's sizes and its parameters before the first step.

    Args:
        config: says what to start from.
        classes: names of the data's classes. A head for another number is drawn anew; of one for
            the same names in another order the outputs change places.

    Returns:
        The sizes, the parameters, and what a user should know about the head, if anything.

    Raises:
        InputError: if what is given cannot be used.
    """
    if config.checkpoint:
        return _from_checkpoint(config, classes)
    if config.model:
        named = with_resolution(named_config(config.model), config.resolution)
        sizes = dataclasses.replace(named, num_classes=len(classes))
    else:
        own = {**config.sizes, "resolution": config.resolution, "num_classes": len(classes)}
        sizes = ViTConfig(**own)
    return sizes, init_parameters(sizes, config.seed), None


def _from_checkpoint(
    config: TrainConfig, classes: Sequence[str]
) -> tuple[ViTConfig, Tree, str | None]:
    assert config.checkpoint is not None
    description = read_description(config.checkpoint)
    stored, names, note = description.config, description.classes, None
    sizes = with_resolution(stored, config.resolution)
    sizes = dataclasses.replace(sizes, num_classes=len(classes))
    parameters = load_parameters(config.checkpoint, stored)
    if config.new_head or stored.num_classes != len(classes):
        smallest = dataclasses.replace(sizes, depth=1, resolution=sizes.patch_size)
        parameters["head"] = init_parameters(smallest, config.seed)["head"]
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
