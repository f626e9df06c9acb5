"""Data, checkpoint and method, opened and checked against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvit_jax.checkpoint import (
    Description,
    choose_method,
    describe_checkpoint,
    fitted_parameters,
    read_description,
)
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.folder import TRAIN
from hvit_jax.data.labels import Classes, Labelled, Labelling, label_pictures
from hvit_jax.data.source import Source, open_source
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import Classifying
from hvit_jax.evaluation.step import Scoring
from hvit_jax.evaluation.texts import TextEmbeddings, read_text_embeddings
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import Tree, abstract_parameters, build_model
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.pictures import Preparing, Preprocessing

# What commands that have this option say of a folder without class folders.
WITHOUT_CLASSES = "for pictures without class folders, give --labels FILE"
_NO_HEAD = (
    "the checkpoint has no classification head; classify its features by --probe knn --train-data "
    "DATA, by --probe linear --train-data DATA, or by --text-embeddings FILE.npz"
)


@dataclass(frozen=True)
class Inputs:
    """Data, checkpoint and method, which fit each other.

    Attributes:
        data: what the command line calls DATA.
        checkpoint: the checkpoint's folder.
        labelled: the pictures, with labels numbered as the head's outputs.
        sizes: the model's; without a head where a probe takes its place.
        reducer: the method.
        preprocessing: how pictures are prepared.
        classifying: what takes the place of the head, if anything does.
        training: the probe's training pictures; None without a probe.
        texts: what zero-shot classification compares with; None without it.
        has_labels: whether the pictures' labels are known; if not, all are 0.
    """

    data: str
    checkpoint: Path
    labelled: Labelled
    sizes: ViTConfig
    reducer: Reducer
    preprocessing: Preprocessing
    classifying: Classifying = Classifying()
    training: Source | None = None
    texts: TextEmbeddings | None = None
    has_labels: bool = True

    @property
    def source(self) -> Source:
        """The pictures that have a label."""
        return self.labelled.source

    @property
    def scoring(self) -> Scoring:
        """How pictures are normalised, and their logits scored; a probe's head comes later."""
        labelled, texts = self.labelled, self.texts
        head = None if texts is None else texts.head
        return Scoring(self.preprocessing, labelled.outputs, labelled.right.shape[1:], head)

    def weights(self, resolution: tuple[int, int] | None = None) -> Tree:
        """Read the weights, without a head's where a probe takes its place.

        Args:
            resolution: of the pictures that they are for; None: the sizes' own.
        """
        stored = read_description(self.checkpoint).config
        resized = dataclasses.replace(stored, resolution=resolution or self.sizes.resolution)
        found = fitted_parameters(self.checkpoint, resized)
        return {name: found[name] for name in abstract_parameters(self.sizes)}

    def model(self, compute: Compute) -> ViT:
        """Read the weights, and build the model."""
        return build_model(self.sizes, self.reducer, self.weights(), compute)

    def describe(self) -> dict[str, Any]:
        """Name them by place and by content, as results do."""
        return {
            "data": self.data,
            "data_sha256": data_sha256(self.source),
            **self.describe_classifying(),
            **self.labelled.describe(),
            "preprocessing": as_json(self.preprocessing),
            "checkpoint": str(self.checkpoint),
            **describe_checkpoint(self.checkpoint),
        }

    def describe_classifying(self) -> dict[str, Any]:
        """Say what classifies in place of a head, if anything does."""
        training, texts, asked = self.training, self.texts, self.classifying
        if training is not None:
            means = f"the {asked.probe_k} nearest" if asked.probe == "knn" else "a linear probe"
            return {
                "classified_by": f"{means} of {len(training)} training pictures",
                "train_data_sha256": data_sha256(training),
            }
        if texts is not None:
            return {
                "classified_by": f"{texts.path.name}, zero-shot",
                "logit_scale": texts.scale,
                "logit_bias": texts.bias,
                "text_embeddings_sha256": texts.sha256,
            }
        return {}


def open_inputs(
    data: str,
    checkpoint: Path,
    resolution: int | tuple[int, int] | None,
    reducer: Reducer | None,
    say: Callable[[str], object],
    *,
    preparing: Preparing = Preparing(),
    labelling: Labelling = Labelling(),
    classifying: Classifying = Classifying(),
    labels: bool | None = True,
    advice: str = "",
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
        classifying: what classifies the features of a model without a head.
        labels: whether pictures need labels, and the model classes; if None, class folders are
            labels where there are any, and of a model without classes the folders are these; if
            False, no labels are read.
        advice: follows what is said of labels that do not fit.

    Raises:
        InputError: if anything cannot be opened or does not fit.
    """
    description = read_description(checkpoint).at(resolution)
    sizes = description.config
    if classifying.probe is not None:
        sizes = dataclasses.replace(sizes, num_classes=0, projection=0, decoder=None)
    reducer = choose_method(reducer, description, say)
    reducer.resolve(sizes)  # Found wrong before thousands of pictures are listed.
    folders = labels if labelling.labels is None else False
    source = open_source(data, exif=preparing.exif, labelled=folders, hint=WITHOUT_CLASSES)
    training = texts = None
    if classifying.train_data is not None:
        training = _open_training(classifying, preparing)
    elif classifying.text_embeddings is not None:
        texts = _open_texts(classifying.text_embeddings, sizes)
    known = labels or labels is None and bool(source.classes or labelling.labels)
    if known:
        classes = _classes(description, training, texts, None if labels else source)
        try:
            labelled = label_pictures(source, classes, labelling)
        except InputError as error:
            raise InputError(f"{error}{advice}") from error
    else:
        labelled = Labelled(source, np.zeros(len(source), np.int32), None, (), "nothing", ())
    for note in (*source.notes, *(training.notes if training else ()), *labelled.notes):
        say(note)
    preprocessing = preparing.changed(description.preprocessing)
    about = (classifying, training, texts, known)
    return Inputs(data, checkpoint, labelled, sizes, reducer, preprocessing, *about)


def _classes(
    description: Description,
    training: Source | None,
    texts: TextEmbeddings | None,
    own: Source | None,
) -> Classes:
    """Name the classes that pictures are told apart by.

    Args:
        description: the model's.
        training: what a probe has seen.
        texts: what zero-shot classification compares with.
        own: whose classes count where a model has none.

    Raises:
        InputError: if there are none.
    """
    if training is not None:
        what = "--train-data"
        return Classes(len(training.classes), training.classes, owner=what, holder=what)
    if texts is not None:
        what = texts.path.name
        return Classes(len(texts.classes), texts.classes, owner=what, holder=what)
    if (decoder := description.config.decoder) is not None:
        command = "segment" if decoder.task == "segmentation" else "depth"
        raise InputError(f"the checkpoint makes maps; score them with hvit {command}")
    if not description.config.num_classes:
        if own is None:
            raise InputError(_NO_HEAD)
        return Classes(len(own.classes), own.classes, owner="the data", holder="the data")
    return Classes(description.config.num_classes, description.classes)


def _open_training(classifying: Classifying, preparing: Preparing) -> Source:
    training = open_source(str(classifying.train_data), TRAIN, exif=preparing.exif)
    if classifying.probe == "knn" and classifying.probe_k > len(training):
        raise InputError(
            f"--probe-k {classifying.probe_k} is more than the {len(training)} training pictures; "
            f"give at most {len(training)}"
        )
    return training


def _open_texts(path: Path, sizes: ViTConfig) -> TextEmbeddings:
    if sizes.decoder is not None:
        raise InputError(
            "--text-embeddings needs embeddings of pictures; the checkpoint makes maps"
        )
    texts = read_text_embeddings(path)
    outputs = sizes.num_classes or sizes.projection or sizes.feature_width
    if texts.embeddings.shape[1] != outputs:
        raise InputError(
            f"{path} has embeddings of {texts.embeddings.shape[1]} numbers, the model's have "
            f"{outputs}; make them with the text tower that belongs to the checkpoint"
        )
    return texts
