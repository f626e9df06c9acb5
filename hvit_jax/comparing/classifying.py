"""Whole pictures under a setting: their classes, or their features, beside the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track

from hvit_jax.calibration.budgets import BlockCounts, measure, propose
from hvit_jax.comparing.settings import Setting
from hvit_jax.comparing.trials import Program, Values
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.picture import PictureError
from hvit_jax.data.preprocess import normalize
from hvit_jax.data.source import Source
from hvit_jax.dense.windows import resize_pixels
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.heads import TEMPERATURE, unit_length, unit_rows
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.loop import labels_of
from hvit_jax.evaluation.step import Outputs, Scoring, Step, compile_features, compile_step
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.parameters import build_model
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.pictures import Preprocessing
from hvit_jax.profiling.device import Latest, device_work, program_memory
from hvit_jax.reducers import as_budgeted

MOST_BYTES = 4 * 10**9
_ROWS = 1024  # Pictures whose neighbours are looked for at once.


@dataclass(frozen=True)
class Found:
    """What a model makes of all pictures, in their order.

    Attributes:
        outputs: logits, votes or features.
        top1: the best output of each.
        correct: which of these are right.
        correct5: which have a right one among the five best.
        finite: whether all numbers are finite.
        report: sums of what the method reports.
        patches: of every picture without classes the directions of all patches' features.
    """

    outputs: Float[np.ndarray, "N outputs"]
    top1: Int[np.ndarray, " N"]
    correct: Bool[np.ndarray, " N"]
    correct5: Bool[np.ndarray, " N"]
    finite: Bool[np.ndarray, " N"]
    report: dict[str, float]
    patches: Float[np.ndarray, "N h w C"] | None = None


@dataclass
class Whole:
    """Runs a model on whole pictures; see `trials.Bench`.

    Attributes:
        inputs: the pictures, with their labels, and the checkpoint.
        sample: the pictures that are taken of them.
        labels: the right outputs of these; None where they are not known.
        scoring: what makes logits, and which compete.
        classes: whether outputs are of classes, or features.
        neighbours: how many vote, of a model without classes.
        workers: processes that decode.
        messages: shows progress.
    """

    inputs: Inputs
    sample: Source
    labels: Int[np.ndarray, "N ..."] | None
    scoring: Scoring
    classes: bool
    neighbours: int
    compute: Compute
    placement: Placement
    batch: int
    workers: int
    messages: Console
    most_bytes: int = MOST_BYTES
    sizes: ViTConfig = field(init=False)

    def __post_init__(self):
        self.sizes = self.inputs.sizes
        self._pixels = Latest(self._load)
        self._weights = Latest(self.inputs.weights)
        self._counts = Latest(self._count)
        self._kept: list[Batch] | None = None

    def batches(self, resolution: tuple[int, int]) -> list[Batch]:
        """Decode the pictures once for each resolution; those of the dense model are kept."""
        if resolution != self.sizes.image_shape:
            return self._pixels(resolution)
        if self._kept is None:
            self._kept = self._load(resolution)
        return self._kept

    def _load(self, resolution: tuple[int, int]) -> list[Batch]:
        how = self.scoring.preprocessing
        if resolution != self.sizes.image_shape:  # As `Description.at` has it.
            how = replace(how, uncovered=(0, 0))
        return load_sample(
            self.sample,
            resolution,
            batch_size=self.batch,
            workers=self.workers,
            messages=self.messages,
            preprocessing=how,
            most_bytes=self.most_bytes,
        )

    def model(self, setting: Setting) -> ViT:
        """Build the model under a setting."""
        sizes = setting.sizes(self.sizes)
        return build_model(sizes, setting.reducer, self._weights(sizes.image_shape), self.compute)

    def with_budgets(self, setting: Setting) -> Setting:
        """Measure budgets on the pictures, as `hvit calibrate` does."""
        if setting.percentile is None:
            return setting
        counts = self._counts(setting.reducer)
        free = as_budgeted(setting.reducer)
        return Setting(propose(free, self.sizes, counts, percentile=setting.percentile))

    def _count(self, free: Reducer) -> list[BlockCounts]:
        return measure(
            self.model(Setting(free)),
            self.batches(self.sizes.image_shape),
            batch_size=self.batch,
            placement=self.placement,
            preprocessing=self.scoring.preprocessing,
        )

    def prepare(self, setting: Setting) -> Program:
        """Compile a setting; of a model without classes what gives patches' features too."""
        model = self.model(setting)
        batches = self.batches(model.config.image_shape)
        if self.classes:
            step = compile_step(model, self.batch, self.placement, self.scoring)
        else:
            how = self.scoring.preprocessing
            step = compile_features(model, self.batch, self.placement, how)
        put = self.placement.shard_batch
        first, none = put(batches[0].pixels), put(self._labels(batches[0]))
        return Program(
            device_work(lambda: step(first, none)),
            program_memory(step.program),
            lambda: self._run(model, step, batches),
        )

    def _labels(self, batch: Batch) -> Int[np.ndarray, "B ..."]:
        """Give the labels of a batch; where they are not known all are the first class."""
        known = self.labels
        if known is None:
            known = np.zeros((len(self.sample), *self.scoring.several), np.int32)
        return labels_of(batch, known)

    def _run(self, model: ViT, step: Step, batches: Sequence[Batch]) -> Found:
        put, outputs = self.placement.shard_batch, []
        for batch in batches:
            found: Outputs = jax.device_get(step(put(batch.pixels), put(self._labels(batch))))
            outputs.append(jax.tree.map(lambda leaf, rows=batch.valid: leaf[rows], found))
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)
        return Found(
            joined.logits,
            joined.top1,
            joined.correct,
            joined.correct_top5,
            joined.finite,
            {name: float(each.sum(dtype=np.float64)) for name, each in joined.report.items()},
            None if self.classes else self._patches(model, batches),
        )

    def _patches(self, model: ViT, batches: Sequence[Batch]) -> Float[np.ndarray, "N h w C"]:
        """Compute the directions of all patches' features, in float16."""
        config, how = model.config, self.scoring.preprocessing
        each = 2 * config.num_patches * config.width
        _refuse_large(len(self.sample), each, "the features of the patches of", self.most_bytes)
        with_weights, weights = part_weights(model)

        def features(weights, pixels):
            images = normalize(pixels, how.mean, how.std)
            found = with_weights(weights).dense_features(images)
            return unit_length(found).astype(jax.numpy.float16)

        compiled = self.placement.compile(features, arrays=1)
        weights, put = self.placement.replicate(weights), self.placement.shard_batch
        rows = [np.asarray(compiled(weights, put(b.pixels)))[b.valid] for b in batches]
        return np.concatenate(rows)

    def values(self, found: Found, dense: Found) -> tuple[Values, dict[str, float]]:
        """Measure classes where outputs are of classes, else features; see `trials.Bench`."""
        if broken := int((~found.finite).sum()):
            what = "logits" if self.classes else "features"
            raise FloatingPointError(f"the {what} of {broken} pictures are not finite numbers")
        values = self._of_classes(found, dense) if self.classes else self._of_features(found, dense)
        return values, found.report

    def _of_classes(self, found: Found, dense: Found) -> Values:
        right = {} if self.labels is None else {"top1": found.correct, "top5": found.correct5}
        values = {**right, "agreement": found.top1 == dense.top1}
        if self.scoring.head is None or not self.scoring.head.votes:
            outputs = slice(None) if self.scoring.outputs is None else list(self.scoring.outputs)
            values["kl"] = kl_divergence(dense.outputs[:, outputs], found.outputs[:, outputs])
        return values

    def _of_features(self, found: Found, dense: Found) -> Values:
        assert found.patches is not None and dense.patches is not None
        values = (
            {}
            if self.labels is None
            else {"knn": leave_one_out(found.outputs, self.labels, self.neighbours)}
        )
        values["cosine"] = cosines(found.outputs, dense.outputs)
        values["patches"] = np.array(
            [
                cosines(resize_pixels(mine.astype(np.float32), theirs.shape[:2]), theirs).mean()
                for mine, theirs in zip(found.patches, dense.patches, strict=True)
            ]
        )
        return values


def load_sample(
    pictures: Source,
    resolution: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    messages: Console,
    preprocessing: Preprocessing = Preprocessing(),
    most_bytes: int = MOST_BYTES,
) -> list[Batch]:
    """Decode pictures once, in batches of equal size that stay in memory.

    Raises:
        PictureError: if a picture cannot be read.
        InputError: if they would take more than `most_bytes`.
    """
    height, width = resolution
    what, count = f"pictures of {height} x {width}", -(-len(pictures) // batch_size)
    _refuse_large(count * batch_size, height * width * 3, what, most_bytes)
    loading = load_batches(
        pictures, resolution, batch_size=batch_size, workers=workers, preprocessing=preprocessing
    )
    with loading as batches:
        hidden = not messages.is_terminal
        decoded = list(track(batches, "decoding", count, console=messages, disable=hidden))
    for batch in decoded:
        for problem in batch.problems.values():
            raise PictureError(problem)
    return decoded


def _refuse_large(count: int, each: int, what: str, most: int) -> None:
    if count * each > most:
        raise InputError(
            f"{what}: {count} take {count * each / 1e9:.1f} GB of memory, more than "
            f"{most / 1e9:g}; use --pictures {most // each}"
        )


def kl_divergence(
    dense: Float[np.ndarray, "N n"], other: Float[np.ndarray, "N n"]
) -> Float[np.ndarray, " N"]:
    """Compute KL(softmax(dense) || softmax(other)) of every row of logits, in nats."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (dense, other))
    return (np.exp(p) * (p - q)).sum(-1)


def _log_softmax(logits: Float[np.ndarray, "N n"]) -> Float[np.ndarray, "N n"]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cosines(
    mine: Float[np.ndarray, "*rows C"], theirs: Float[np.ndarray, "*rows C"]
) -> Float[np.ndarray, " *rows"]:
    """Compute the cosine of every two vectors; 0 where one of them is zero."""
    mine, theirs = mine.astype(np.float32), theirs.astype(np.float32)
    lengths = np.linalg.norm(mine, axis=-1) * np.linalg.norm(theirs, axis=-1)
    return (mine * theirs).sum(-1) / np.maximum(lengths, 1e-12)


def leave_one_out(
    features: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"], k: int
) -> Bool[np.ndarray, " N"]:
    """Tell which pictures the vote of their k nearest others puts into their class.

    Votes weigh as in `evaluation.heads.Neighbours`.
    """
    units = unit_rows(features).astype(np.float32)
    k, right = min(k, len(units) - 1), []
    for start in range(0, len(units), _ROWS):
        alike = units[start : start + _ROWS] @ units.T
        rows = np.arange(len(alike))
        alike[rows, start + rows] = -np.inf
        nearest = np.argsort(-alike, axis=1, kind="stable")[:, :k]
        weights = np.exp(np.take_along_axis(alike, nearest, axis=1) / TEMPERATURE)
        votes = np.zeros((len(alike), int(labels.max()) + 1))
        np.add.at(votes, (rows[:, None], labels[nearest]), weights)
        right.append(votes.argmax(1) == labels[start : start + _ROWS])
    return np.concatenate(right)
