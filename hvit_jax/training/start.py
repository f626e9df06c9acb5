"""Where a run starts: sizes and first parameters, and the trainer, as the command line says."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import load_parameters, read_description, resize_parameters
from hvit_jax.config import ViTConfig, named_config
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, init_parameters
from hvit_jax.reducers import Reducer
from hvit_jax.training.optimizer import make_optimizer
from hvit_jax.training.trainer import Trainer

SIZES = ("patch_size", "depth", "width", "heads", "mlp_width")


def first_parameters(
    options: argparse.Namespace, classes: Sequence[str]
) -> tuple[ViTConfig, Tree, str | None]:
    """Find the model's sizes and its parameters before the first step.

    Args:
        options: the command line; one of --checkpoint, --model and sizes says what to start from.
        classes: names of the data's classes. A head for another number is drawn anew; of one for
            the same names in another order the outputs change places.

    Returns:
        The sizes, the parameters, and what a user should know about the head, if anything.

    Raises:
        InputError: if none or several are given, or what is given cannot be used.
    """
    sizes = {name: getattr(options, name) for name in SIZES}
    if bool(options.checkpoint) + bool(options.model) + any(sizes.values()) != 1:
        raise InputError("give one of --checkpoint, --model, or the sizes of a model of your own")
    if options.new_head and not options.checkpoint:
        raise InputError("--new-head is for --checkpoint; other starts have a new head anyway")
    if options.checkpoint:
        return _from_checkpoint(options, classes)
    if options.model:
        config = with_resolution(named_config(options.model), options.resolution)
        config = dataclasses.replace(config, num_classes=len(classes))
    else:
        sizes["resolution"] = options.resolution
        missing = ["--" + name.replace("_", "-") for name, value in sizes.items() if not value]
        if missing:
            raise InputError(f"a model of your own also needs {', '.join(missing)}")
        config = ViTConfig(**sizes, num_classes=len(classes))
    return config, init_parameters(config, options.seed), None


def _from_checkpoint(
    options: argparse.Namespace, classes: Sequence[str]
) -> tuple[ViTConfig, Tree, str | None]:
    description = read_description(options.checkpoint)
    stored, names, note = description.config, description.classes, None
    config = with_resolution(stored, options.resolution)
    config = dataclasses.replace(config, num_classes=len(classes))
    parameters = load_parameters(options.checkpoint, stored)
    if options.new_head or stored.num_classes != len(classes):
        smallest = dataclasses.replace(config, depth=1, resolution=config.patch_size)
        parameters["head"] = init_parameters(smallest, options.seed)["head"]
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
    return config, resize_parameters(parameters, stored, config), note


def make_trainer(
    options: argparse.Namespace,
    config: ViTConfig,
    reducer: Reducer,
    steps_per_epoch: float,
    placement: Placement,
) -> tuple[Trainer, int]:
    """Build the trainer that the command line asks for, and count the steps.

    Args:
        options: the command line.
        config: the model's sizes.
        reducer: the method, resolved for them.
        steps_per_epoch: training pictures, divided by those of a step.
        placement: the devices.
    """
    total = max(1, round(options.epochs * steps_per_epoch))
    optimizer = make_optimizer(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=round(options.warmup_epochs * steps_per_epoch),
        total_steps=total,
        layer_decay=options.layer_decay,
    )
    trainer = Trainer(
        config,
        reducer,
        optimizer,
        dtype=options.dtype,
        label_smoothing=options.label_smoothing,
        part=options.train,
        accumulate=options.accumulate,
        remat=options.remat,
        ema=options.ema,
        placement=placement,
    )
    return trainer, total
