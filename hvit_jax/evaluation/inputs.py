"""Data and checkpoint, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.config import Preparing, Preprocessing, ViTConfig
from hvit_jax.data.labels import Labelled, Labelling, label_pictures
from hvit_jax.data.source import open_source
from hvit_jax.models.reducer import Reducer


def open_inputs(
    data: str,
    checkpoint: Path,
    resolution: int | tuple[int, int] | None,
    say: Callable[[str], object],
    reducer: Reducer = Reducer(),
    *,
    preparing: Preparing = Preparing(),
    labelling: Labelling = Labelling(),
) -> tuple[Labelled, ViTConfig, Preprocessing]:
    """Open data and checkpoint, and check that they and a method fit each other.

    Args:
        data: what the command line calls DATA.
        checkpoint: the checkpoint's folder.
        resolution: the picture size; None: the checkpoint's.
        say: is told what a user should know about pictures and classes, if anything.
        reducer: the method.
        preparing: what is changed of the checkpoint's preprocessing.
        labelling: how pictures get their labels.

    Returns:
        The pictures with labels numbered as the head's outputs, the model's sizes, and how pictures
        are prepared.

    Raises:
        InputError: if anything cannot be opened or does not fit.
    """
    description = read_description(checkpoint)
    sizes = with_resolution(description.config, resolution)
    reducer.resolve(sizes)  # Found wrong before thousands of pictures are listed.
    source = open_source(data, exif=preparing.exif, labelled=labelling.labels is None)
    labelled = label_pictures(source, description, labelling)
    for note in (*source.notes, *labelled.notes):
        say(note)
    return labelled, sizes, preparing.changed(description.preprocessing)
