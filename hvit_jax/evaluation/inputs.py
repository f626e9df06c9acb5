"""Data and checkpoint of a command line, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hvit_jax import demo
from hvit_jax.checkpoint import Description, read_description
from hvit_jax.commands.method_options import numbers_hint
from hvit_jax.data.source import Source, open_source
from hvit_jax.errors import InputError
from hvit_jax.evaluation.labels import head_labels


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
    checkpoint: str
    description: Description
    labels: tuple[int, ...]

    @property
    def note(self) -> str | None:
        """What a user should know about the classes, if anything."""
        known = self.description.classes
        if not known or set(self.source.classes) == set(known):
            return None
        return "the data's class names are not the checkpoint's; classes go by their order"


def data_or_demo(data: str | None, checkpoint: str | None) -> tuple[str, str]:
    """Take the demo's pictures and checkpoint where not both are given."""
    if data is None or checkpoint is None:
        return str(demo.images_dir()), str(demo.checkpoint_dir())
    return data, checkpoint


def data_and_checkpoint(
    data: str | None, checkpoint: str | None, arguments: Sequence[str]
) -> tuple[str, str]:
    """Check that a command line names both or neither, which stands for the demo.

    Args:
        data: what it calls DATA.
        checkpoint: what it calls --checkpoint.
        arguments: all of it, without the program's name.

    Raises:
        InputError: if only one is given.
    """
    if (data is None) != (checkpoint is None):
        hint = "" if data is None else numbers_hint(arguments, data)
        raise InputError(f"give both DATA and --checkpoint DIR, or neither for the demo{hint}")
    return data_or_demo(data, checkpoint)


def open_inputs(data: str, checkpoint: str) -> Inputs:
    """Check everything that can be checked before weights and pictures are read.

    Raises:
        InputError: if either cannot be opened, or they do not fit each other.
    """
    description = read_description(checkpoint)
    source = open_source(data)
    labels = head_labels(source.labels, source.classes, description)
    return Inputs(data, source, checkpoint, description, labels)
