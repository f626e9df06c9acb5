"""Data and checkpoint of a command line, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvit_jax import demo
from hvit_jax.checkpoint import Description, read_description
from hvit_jax.data.source import Source, open_source
from hvit_jax.errors import InputError


@dataclass(frozen=True)
class Inputs:
    """Data and checkpoint, which fit each other.

    Attributes:
        data: what the command line calls DATA.
        source: its pictures.
        checkpoint: the checkpoint's folder.
        description: what it says of itself.
        labels: of all pictures, numbered as the head's outputs.
    """

    data: str
    source: Source
    checkpoint: Path
    description: Description
    labels: tuple[int, ...]

    @property
    def note(self) -> str | None:
        """What a user should know about the classes, if anything."""
        known = self.description.classes
        if not known or set(self.source.classes) == set(known):
            return None
        return "the data's class names are not the checkpoint's; classes go by their order"


def check_both_or_neither(data: str | None, checkpoint: Path | None) -> None:
    """Check that data and checkpoint are both named, or neither, which stands for the demo.

    Raises:
        InputError: if only one is.
    """
    if (data is None) != (checkpoint is None):
        given = "--checkpoint DIR is given without DATA"
        if data is not None:
            given = f"DATA is given without --checkpoint DIR, as {data!r}"
        raise InputError(f"{given}; give both DATA and --checkpoint DIR, or neither for the demo")


def or_demo(data: str | None, checkpoint: Path | None) -> tuple[str, Path]:
    """Take the demo's pictures and checkpoint where neither is named."""
    if data is None or checkpoint is None:
        return str(demo.images_dir()), demo.checkpoint_dir()
    return data, checkpoint


def open_inputs(data: str | None, checkpoint: Path | None) -> Inputs:
    """Check everything that can be checked before weights and pictures are read.

    Args:
        data: a folder or `tfds:NAME[:SPLIT]`; None for the demo's pictures.
        checkpoint: its folder; None for the demo's.

    Raises:
        InputError: if either cannot be opened, or they do not fit each other.
    """
    data, checkpoint = or_demo(data, checkpoint)
    description = read_description(checkpoint)
    source = open_source(data)
    labels = head_labels(source.labels, source.classes, description)
    return Inputs(data, source, checkpoint, description, labels)


def head_labels(
    labels: Sequence[int], classes: Sequence[str], description: Description
) -> tuple[int, ...]:
    """Translate labels to the numbers of the head's outputs.

    Where data and checkpoint name the same classes, names decide; else the places in the order of
    both, as for ImageNet, whose folders and head are in the order of the WordNet numbers.

    Args:
        labels: indices into `classes`.
        classes: names of the data's classes.
        description: the checkpoint's.

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
