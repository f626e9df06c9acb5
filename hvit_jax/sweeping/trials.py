"""Settings tried on a sample of the pictures: accuracy, and speed beside the dense model."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.progress import track

from hvit_jax.calibration.budgets import BlockCounts, measure, propose
from hvit_jax.config import Compute, Preprocessing, ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.source import Source
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.loop import score
from hvit_jax.evaluation.step import Scoring, Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.parameters import Tree, build_model
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.profiling.device import Latest, Work, device_work, rates_and_ratios, time_in_turns
from hvit_jax.published import describe_configuration
from hvit_jax.reducers import as_budgeted
from hvit_jax.sweeping.choice import Candidate, Trial

MOST_BYTES = 4 * 10**9


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
        InputError: if a picture cannot be read, or they would take more than `most_bytes`.
    """
    size, (height, width) = batch_size, resolution
    count = -(-len(pictures) // size)
    needed = count * size * height * width * 3
    if needed > most_bytes:
        most = most_bytes // (height * width * 3) // size * size
        raise InputError(
            f"{len(pictures)} pictures of {height} x {width} take {needed / 1e9:.1f} GB of memory, "
            f"more than {most_bytes / 1e9:g}; use --pictures {most}"
        )
    loading = load_batches(
        pictures, resolution, batch_size=size, workers=workers, preprocessing=preprocessing
    )
    with loading as batches:
        hidden = not messages.is_terminal
        decoded = list(track(batches, "decoding", count, console=messages, disable=hidden))
    for batch in decoded:
        for problem in batch.problems.values():
            raise InputError(problem)
    return decoded


@dataclass
class Trials:
    """Tries candidates on the same pictures, the dense model first."""

    sizes: ViTConfig
    weights: Tree
    compute: Compute
    batches: Sequence[Batch]  # From `load_sample`.
    labels: Int[np.ndarray, "N ..."]  # Of every picture, numbered as the head's outputs.
    scoring: Scoring
    placement: Placement
    seconds: float  # How long a round of timing takes, about.
    timer: Callable[..., list[list[float]]] = time_in_turns
    # Which pictures the dense model has right; to be set as soon as that is known.
    dense_correct: Bool[np.ndarray, " n"] = field(init=False)

    def __post_init__(self):
        self._counts = Latest(self._count)

    @property
    def batch(self) -> int:
        """Pictures in every batch, with padding."""
        return len(self.batches[0].pixels)

    def with_budgets(self, candidate: Candidate) -> Reducer:
        """Give a candidate's method the budgets that its pictures need; others stay as they are.

        Raises:
            RuntimeError: if the device runs out of memory.
        """
        free = candidate.reducer
        if candidate.percentile is None:
            return free
        counts = self._counts(free)
        return propose(as_budgeted(free), self.sizes, counts, percentile=candidate.percentile)

    def _count(self, free: Reducer) -> list[BlockCounts]:
        model = self._model(free)
        return measure(
            model,
            self.batches,
            batch_size=self.batch,
            placement=self.placement,
            preprocessing=self.scoring.preprocessing,
        )

    def row(self, candidate: Candidate, reducer: Reducer) -> Trial:
        """Give the row of a candidate, whose method has budgets now, before it is measured."""
        return Trial(
            **describe_configuration(self.sizes, reducer),
            batch=self.batch,
            dtype=self.compute.dtype,
            gflops=count_flops(self.sizes, reducer) / 1e9,
            tried=candidate.tried,
            devices=self.placement.devices,
        )

    def measure(self, candidate: Candidate, reducer: Reducer) -> Trial:
        """Score the sample, and time a batch in turns with the dense model.

        Raises:
            FloatingPointError: if logits are not finite.
            RuntimeError: if the device runs out of memory.
        """
        dense = reducer.name == "dense"
        step = self._dense if dense else self._compile(reducer)
        tally, correct = self._score(step)
        works = [self._work(each) for each in ([step] if dense else [step, self._dense])]
        times = self.timer(works, seconds=self.seconds)
        rates, ratios = rates_and_ratios(times, self.batch)
        (speedups,) = ratios or [[1.0]]
        drop, error = paired_difference(correct if dense else self.dense_correct, correct)
        return replace(
            self.row(candidate, reducer),
            throughput=statistics.median(rates),
            top1=tally.totals.percent(tally.totals.correct),
            drop=drop,
            drop_error=error,
            speedup=statistics.median(speedups),
            speedup_range=[min(speedups), max(speedups)],
            report=tally.totals.report,
            correct="".join("01"[int(right)] for right in correct),
        )

    @functools.cached_property
    def _dense(self) -> Step:
        return self._compile(Reducer())

    def _compile(self, reducer: Reducer) -> Step:
        return compile_step(self._model(reducer), self.batch, self.placement, self.scoring)

    def _model(self, reducer: Reducer) -> ViT:
        return build_model(self.sizes, reducer, self.weights, self.compute)

    def _score(self, step: Step) -> tuple[Tally, Bool[np.ndarray, " n"]]:
        """Score the sample: the sums, and which pictures are right."""
        tally = Tally()
        score(step, self.batches, self.labels, tally, self.placement.shard_batch)
        if count := tally.totals.not_finite:
            raise FloatingPointError(f"the logits of {count} pictures are not finite numbers")
        return tally, np.concatenate([rows.correct for rows in tally.rows])

    def _work(self, step: Step) -> Work:
        """Make the first batch something to time."""
        pixels = self.placement.shard_batch(self.batches[0].pixels)
        labels = self.placement.shard_batch(
            np.zeros((len(pixels), *self.scoring.several), np.int32)
        )
        return device_work(lambda: step(pixels, labels))


def paired_difference(
    before: Bool[np.ndarray, " n"], after: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """Give the accuracy that is lost, in percentage points, and its standard error.

    Most pictures are right or wrong under both models, so the difference is known far better than
    either accuracy.
    """
    lost = 100.0 * (before.astype(float) - after.astype(float))
    spread = lost.std(ddof=1) if len(lost) > 1 else 0.0
    return float(lost.mean()), float(spread / len(lost) ** 0.5)
