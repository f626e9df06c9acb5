"""Data and checkpoint, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import Description, read_description
from hvit_jax.config import ViTConfig
from hvit_jax.data.source import Source, open_source
from hvit_jax.errors import InputError
from hvit_jax.models.reducer import Reducer


def open_inputs(
    data: str,
    checkpoint: Path,
    resolution: int | tuple[int, int] | None,
    say: Callable[[str], object],
    reducer: Reducer = Reducer(),
) -> tuple[Source, tuple[int, ...], ViTConfig]:
    """Open data and checkpoint, and check that they and a method fit each other.

    Args:
        data: what the command line calls DATA.
        checkpoint: the checkpoint's folder.
        resolution: the picture size; None: the checkpoint's.
        say: is told what a user should know about the classes, if anything.
        reducer: the method.

    Returns:
        The pictures, their labels numbered as the head's outputs, and the model's sizes.

    Raises:
        InputError: if anything cannot be opened or does not fit.
    """
    description = read_description(checkpoint)
    sizes = with_resolution(description.config, resolution)
    reducer.resolve(sizes)  # Found wrong before thousands of pictures are listed.
    source = open_source(data)
    labels = head_labels(source.labels, source.classes, description)
    if description.classes and set(source.classes) != set(description.classes):
        say("the data's class names are not the checkpoint's; classes go by their order")
    return source, labels, sizes


def head_labels(
    labels: Sequence[int], classes: Sequence[str], description: Description
) -> tuple[int, ...]:
    """Translate labels, which are indices into `classes`, to the numbers of the head's outputs.

    Where data and checkpoint name the same classes, names decide; else the places in the order of
    both, as for ImageNet, whose folders and head are in the order of the WordNet numbers.

    Raises:
        InputError: if the checkpoint has no head, or one for another number of classes.
    """
    outputs = description.config.num_classes
    if not outputs:
        raise InputError(
            "the checkpoint has no classification head; evaluate a fine-tuned one, such as SWAG's "
            "*_in1k files"
        )
    if len(classes) != outputs:
        raise InputError(
            f"the data has {len(classes)} classes, the checkpoint's head has {outputs}"
        )
    if set(classes) != set(description.classes):
        return tuple(labels)
    places = [description.classes.index(name) for name in classes]
    return tuple(places[label] for label in labels)
