"""What is compared: pictures and checkpoint, opened, and the bench that suits the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from hvit_jax.checkpoint import Description, describe_checkpoint, read_description
from hvit_jax.comparing.classifying import Whole
from hvit_jax.comparing.config import CompareConfig
from hvit_jax.comparing.mapping import Maps, subset
from hvit_jax.comparing.scores import CONFIDENCE, DRAWS, SEED
from hvit_jax.comparing.trials import Bench
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.source import SAMPLING, even_places, take_evenly
from hvit_jax.dense.config import LabelTruth
from hvit_jax.dense.folders import NONE, open_scenes
from hvit_jax.dense.metrics import Depth, Segmentation, class_names
from hvit_jax.dense.windows import fit_windows
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import Inputs, open_inputs
from hvit_jax.evaluation.probing import Training
from hvit_jax.evaluation.step import Scoring
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import Options, as_json, flag, given
from hvit_jax.models.reducer import Reducer
from hvit_jax.profiling.device import describe_device

# Pictures, or windows, at once where nobody says.
_PICTURES, _WINDOWS = 64, 8


@dataclass(frozen=True)
class Opened:
    """What is compared.

    Attributes:
        bench: runs the model on the pictures.
        pictures: the names of those taken.
        about: what results follow from, as files have it.
        unit: what a batch consists of.
    """

    bench: Bench
    pictures: tuple[str, ...]
    about: dict[str, Any]
    unit: str


def open_comparison(config: CompareConfig, messages: Console) -> Opened:
    """Open pictures and checkpoint, and choose the bench.

    Raises:
        InputError: if anything cannot be opened or does not fit.
    """
    checkpoint = config.inputs[1]
    description, placement = read_description(checkpoint).at(config.resolution), place()
    if description.config.decoder is None or config.classifying.probe is not None:
        found = _open_whole(config, placement, messages)
    else:
        found = _open_maps(config, description, placement, messages)
    bootstrap = {"draws": DRAWS, "seed": SEED, "confidence": CONFIDENCE}
    about = {
        **describe_device(placement.devices),
        "pictures": len(found.pictures),
        "sampling": SAMPLING,
        "bootstrap": bootstrap,
        **found.about,
        **describe_checkpoint(checkpoint),
    }
    return replace(found, about=about)


def _refuse(config: CompareConfig, names: tuple[str, ...], why: str) -> None:
    """Refuse options that a model has no use for.

    Raises:
        InputError: that names them.
    """
    for name in names:
        value = getattr(config, name)
        words = value.words() if isinstance(value, Options) else [flag(name)]
        if name in given(config):
            raise InputError(f"{words[0]} is for {why}")


def _open_whole(config: CompareConfig, placement: Placement, messages: Console) -> Opened:
    """Open pictures for a model of classes or features."""
    data, checkpoint = config.inputs
    _refuse(config, ("truth", "depth", "windows", "restore"), "models that make maps")
    inputs = open_inputs(
        data,
        checkpoint,
        config.resolution,
        Reducer(),
        messages.print,
        preparing=config.preparing,
        labelling=config.labelling,
        classifying=config.classifying,
        labels=False if config.unlabelled else None,
        advice="; --unlabelled leaves labels aside",
    )
    heads = inputs.sizes.num_classes or inputs.training or inputs.texts
    if not heads and config.labelling.labels is not None:
        raise InputError(
            "--labels is for models with classes; of one without, class folders are the classes"
        )
    if not inputs.has_labels:
        messages.print("no labels: compared with what the dense model says")
    # At even distances over the data, and so over its classes.
    sample = take_evenly(inputs.source, config.pictures)
    if len(sample) < 2:
        raise InputError(f"{data} holds one picture; a comparison needs at least 2")
    labels = inputs.labelled.right[list(sample.indices)] if inputs.has_labels else None
    # A whole batch is divided among the devices, as hvit eval does it.
    size = placement.round_up(min(config.batch_size or _PICTURES, len(sample)))
    bench = Whole(
        inputs,
        sample,
        labels,
        _scoring(inputs, config, placement, size, messages),
        bool(heads),
        config.classifying.probe_k,
        config.compute,
        placement,
        size,
        config.workers,
        messages,
    )
    about = {
        "data_sha256": data_sha256(inputs.source),
        **inputs.describe_classifying(),
        **inputs.labelled.describe(),
        "preprocessing": as_json(inputs.preprocessing),
    }
    return Opened(bench, sample.paths, about, "images")


def _scoring(
    inputs: Inputs, config: CompareConfig, placement: Placement, size: int, messages: Console
) -> Scoring:
    """Say how all settings are scored; a probe is trained on the dense model's features."""
    if inputs.training is None:
        return inputs.scoring
    model = inputs.model(config.compute)
    training = Training(inputs, model, placement, size, config.workers, messages)
    head, _ = training.learn(Tally(keep_logits=True))
    return replace(inputs.scoring, head=head)


def _open_maps(
    config: CompareConfig, description: Description, placement: Placement, messages: Console
) -> Opened:
    """Open pictures for a model that makes maps."""
    data, checkpoint = config.inputs
    prepared = replace(config, preparing=replace(config.preparing, exif=False))
    _refuse(prepared, ("labelling", "classifying", "preparing"), "models of classes")
    if config.resolution is not None:
        raise InputError("--resolution is for models of classes; give --window")
    decoder = description.config.decoder
    assert decoder is not None
    windows = config.windows.over(description.windows)
    sizes, layout = fit_windows(description.config, windows, config.restore)
    truth = config.truth
    if config.unlabelled:
        truth = LabelTruth(truth=NONE, split=truth.split)
    if decoder.task == "segmentation":
        _refuse(config, ("depth",), "models of depth")
        wanted = as_json(truth)
        metric = Segmentation(class_names(decoder.outputs, description.classes))
    else:
        if truth.dataset is not None or truth.reduce_zero_label:
            raise InputError("--dataset and --reduce-zero-label are for models of segments")
        wanted = {"truth": truth.truth, "split": truth.split}
        wanted["depth_scale"] = config.depth.depth_scale
        metric = Depth(*(config.depth.depth_range or decoder.depth_range))
    scenes = open_scenes(data, **{**wanted, "exif": config.preparing.exif})
    scenes.refuse_other_classes(decoder.outputs, checkpoint)
    if not scenes.truths:
        messages.print("no truth: compared with what the dense model says")
    places = even_places(config.pictures, len(scenes))
    if len(places) < 2:
        raise InputError(f"{data} holds one picture; a comparison needs at least 2")
    sample = subset(scenes, places)
    size = placement.round_up(config.batch_size or _WINDOWS)
    bench = Maps(
        sample,
        checkpoint,
        description,
        sizes,
        layout,
        metric,
        config.compute,
        placement,
        size,
        config.workers,
    )
    about = {
        "task": decoder.task,
        **scenes.describe(),
        "cut": dataclasses.asdict(layout),
        "preprocessing": as_json(description.preprocessing),
    }
    return Opened(bench, sample.paths, about, "windows")
