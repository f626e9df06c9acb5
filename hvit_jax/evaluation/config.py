"""What an evaluation is told: the options of `hvit eval`."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax import demo
from hvit_jax.config import IN_COMMANDS, Compute
from hvit_jax.data.labels import Labelling
from hvit_jax.distributed.processes import Processes
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, nested, option
from hvit_jax.pictures import Preparing
from hvit_jax.reducers import Reducer, method_of_checkpoint
from hvit_jax.system.programs import CACHE_HELP


def workers_option() -> Any:
    """Declare how many processes decode pictures."""
    return option(
        min(8, os.cpu_count() or 1),
        "processes that decode, by default one a core up to 8; 0: threads",
        short="-j",
        least=0,
    )


@dataclass(frozen=True)
class OnPictures(Options):
    """What every command is told that runs a checkpoint on labelled pictures."""

    data: str | None = option(
        None,
        "class folders of pictures, a folder whose val/, validation/ or test/ holds them, or "
        "tfds:NAME[:SPLIT]",
        positional=True,
    )
    checkpoint: Path | None = option(
        None, "a folder written by hvit convert or by training", metavar="DIR"
    )
    resolution: int | tuple[int, int] | None = option(
        None, "picture size, one number or height,width (default: the checkpoint's)", short="-r"
    )
    preparing: Preparing = nested(Preparing)
    compute: Compute = nested(Compute, leave=("param_dtype", "remat"), choices=IN_COMMANDS)
    batch_size: int = option(64, "pictures at once, of all devices together", short="-b", least=1)
    workers: int = workers_option()
    cache: bool = option(True, CACHE_HELP)

    def __post_init__(self):
        super().__post_init__()
        if (self.data is None) != (self.checkpoint is None):
            given = "--checkpoint DIR is given without DATA"
            if self.data is not None:
                given = f"DATA is given without --checkpoint DIR, as {self.data!r}"
            raise InputError(
                f"{given}; give both DATA and --checkpoint DIR, or neither for the demo"
            )

    @property
    def inputs(self) -> tuple[str, Path]:
        """Data and checkpoint; the demo's where neither is named."""
        if self.data is None or self.checkpoint is None:
            return str(demo.images_dir()), demo.checkpoint_dir()
        return self.data, self.checkpoint


_classes = functools.partial(option, group="classes for a model without a head")


@dataclass(frozen=True)
class Classifying(Options):
    """What classifies the features of a model without a head; see docs/probing.md.

    Raises:
        InputError: for options that do not go together.
    """

    probe: str | None = _classes(
        None,
        "classify frozen features: by the vote of the nearest training pictures, or by logistic "
        "regression",
        choices=("knn", "linear"),
    )
    train_data: str | None = _classes(
        None,
        "the probe's training pictures: class folders, a folder whose train/ holds them, or "
        "tfds:NAME[:SPLIT]",
        metavar="DATA",
    )
    probe_k: int = _classes(20, "neighbours that vote", least=1)
    probe_weight_decay: float | None = _classes(
        None,
        "of logistic regression (default: the best on every tenth training picture)",
        least=0,
    )
    text_embeddings: Path | None = _classes(
        None,
        "classify zero-shot: embeddings and classes of texts, for CLIP and SigLIP models",
        metavar="FILE.npz",
        ends=(".npz",),
    )

    def __post_init__(self):
        super().__post_init__()
        if (self.probe is None) != (self.train_data is None):
            raise InputError("--probe knn|linear and --train-data DATA go together")
        if self.probe is not None and self.text_embeddings is not None:
            raise InputError("--probe and --text-embeddings contradict each other; give one")
        if self.probe != "knn" and self.probe_k != type(self).probe_k:
            raise InputError("--probe-k is for --probe knn")
        if self.probe != "linear" and self.probe_weight_decay is not None:
            raise InputError("--probe-weight-decay is for --probe linear")


@dataclass(frozen=True)
class EvalConfig(OnPictures):
    """What to evaluate, and how; every field is a flag of `hvit eval`.

    `verify` is the command's: it makes the record of that file's evaluation, and compares
    afterwards. `evaluate` itself only keeps it in the results.

    Raises:
        InputError: for values that are wrong or do not go together.
    """

    reducer: Reducer | None = method_of_checkpoint()
    labelling: Labelling = nested(Labelling)
    classifying: Classifying = nested(Classifying)
    on_error: str = option(
        "stop", "at unreadable pictures: stop, or skip and list them", choices=("stop", "skip")
    )
    output: Path | None = option(
        None, "write the results", short="-o", metavar="FILE.json", ends=(".json",)
    )
    predictions: Path | None = option(
        None,
        "write paths, labels, logits and top1 of every picture, and names of classes",
        metavar="FILE.npz",
        ends=(".npz",),
    )
    verify: Path | None = option(
        None,
        "repeat the evaluation that wrote this file and compare; exit status 1 if results differ",
        metavar="FILE.json",
    )
    overwrite: bool = option(False, "let --output and --predictions replace files that exist")
    resume: bool = option(
        False,
        "continue an evaluation that was stopped or killed; the other options stay the same",
    )
    processes: Processes = nested(Processes)

    def __post_init__(self):
        super().__post_init__()
        if self.resume and self.output is None:
            raise InputError("--resume needs --output FILE.json, where scored pictures are saved")
