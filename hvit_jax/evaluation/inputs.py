"""Data, checkpoint and method, opened and checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import (
    choose_method,
    describe_checkpoint,
    fitted_parameters,
    read_description,
)
from hvit_jax.config import Compute, Preparing, Preprocessing, ViTConfig
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.labels import Labelled, Labelling, label_pictures
from hvit_jax.data.source import Source, open_source
from hvit_jax.evaluation.step import Scoring
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT

# What commands that have this option say of a folder without class folders.
WITHOUT_CLASSES = "for pictures without class folders, give --labels FILE"


@dataclass(frozen=True)
class Inputs:
    """Data, checkpoint and method, which fit each other.

    Attributes:
        data: what the command line calls DATA.
        checkpoint: the checkpoint's folder.
        labelled: the pictures, with labels numbered as the head's outputs.
        sizes: the model's.
        reducer: the method.
        preprocessing: how pictures are prepared.
    """

    data: str
    checkpoint: Path
    labelled: Labelled
    sizes: ViTConfig
    reducer: Reducer
    preprocessing: Preprocessing

    @property
    def source(self) -> Source:
        """The pictures that have a label."""
        return self.labelled.source

    @property
    def scoring(self) -> Scoring:
        """How pictures are normalised, and their logits scored."""
        labelled = self.labelled
        return Scoring(self.preprocessing, labelled.outputs, labelled.right.shape[1:])

    def model(self, compute: Compute) -> ViT:
        """Read the weights, and build the model."""
        parameters = fitted_parameters(self.checkpoint, self.sizes)
        return build_model(self.sizes, self.reducer, parameters, compute)

    def describe(self) -> dict[str, Any]:
        """Name them by place and by content, as results do."""
        return {
            "data": self.data,
            "data_sha256": data_sha256(self.source),
            **self.labelled.describe(),
            "preprocessing": as_json(self.preprocessing),
            "checkpoint": str(self.checkpoint),
            **describe_checkpoint(self.checkpoint),
        }


def open_inputs(
    data: str,
    checkpoint: Path,
    resolution: int | tuple[int, int] | None,
    reducer: Reducer | None,
    say: Callable[[str], object],
    *,
    preparing: Preparing = Preparing(),
    labelling: Labelling = Labelling(),
) -> Inputs:
    """Open data and checkpoint, and check that they and a method fit each other.

    Args:
        data: what the command line calls DATA.
        checkpoint: the checkpoint's folder.
        resolution: the picture size; None: the checkpoint's.
        reducer: the method; None: the one that the checkpoint was trained with.
        say: is told what a user should know about pictures, classes and method, if anything.
        preparing: what is changed of the checkpoint's preprocessing.
        labelling: how pictures get their labels.

    Raises:
        InputError: if anything cannot be opened or does not fit.
    """
    description = read_description(checkpoint)
    sizes = with_resolution(description.config, resolution)
    reducer = choose_method(reducer, description, say)
    reducer.resolve(sizes)  # Found wrong before thousands of pictures are listed.
    source = open_source(
        data, exif=preparing.exif, labelled=labelling.labels is None, hint=WITHOUT_CLASSES
    )
    labelled = label_pictures(source, description, labelling)
    for note in (*source.notes, *labelled.notes):
        say(note)
    preprocessing = preparing.changed(description.preprocessing)
    return Inputs(data, checkpoint, labelled, sizes, reducer, preprocessing)
