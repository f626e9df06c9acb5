"""Settings tried on a sample of the pictures: accuracy, and speed beside the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool

from hvit_jax.calibration.budgets import BlockCounts, measure, propose
from hvit_jax.checkpoint import fitted_parameters
from hvit_jax.config import ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.source import Subset
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import Inputs, head_labels
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.profiling.bench import DENSE, Bench
from hvit_jax.profiling.device import Work, device_work
from hvit_jax.published import describe_configuration
from hvit_jax.reducers import as_budgeted
from hvit_jax.sweeping.candidates import Candidate
from hvit_jax.sweeping.choice import Trial
from hvit_jax.sweeping.config import SweepConfig

MOST_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Sample:
    """Prepared pictures, decoded once and kept in memory.

    Attributes:
        batches: the pictures in batches of equal size, the last one padded.
        labels: the right class of every picture, as the head's outputs are numbered.
    """

    batches: tuple[Batch, ...]
    labels: tuple[int, ...]

    @property
    def batch_size(self) -> int:
        """Rows of every batch."""
        return len(self.batches[0].pixels)


def load_sample(
    part: Subset,
    inputs: Inputs,
    resolution: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    show: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, total: batches,
    most_bytes: int = MOST_BYTES,
) -> Sample:
    """Decode pictures.

    Args:
        part: the pictures.
        inputs: all pictures, and the checkpoint.
        resolution: height and width of the prepared pictures.
        batch_size: rows of a batch.
        workers: processes that decode.
        show: wraps the batches, of which it is told the number, to show progress.
        most_bytes: of memory that the sample may take.

    Raises:
        InputError: if a picture cannot be read, or the sample would take too much memory.
    """
    size, (height, width) = batch_size, resolution
    needed = -(-len(part) // size) * size * height * width * 3
    if needed > most_bytes:
        most = most_bytes // (height * width * 3) // size * size
        raise InputError(
            f"{len(part)} pictures of {height} x {width} take {needed / 1e9:.1f} GB of memory, "
            f"more than {most_bytes / 1e9:g}; use --pictures {most}"
        )
    with load_batches(part, resolution, batch_size=size, workers=workers) as batches:
        decoded = tuple(show(batches, -(-len(part) // size)))
    for batch in decoded:
        for problem in batch.problems.values():
            raise InputError(problem)
    return Sample(decoded, head_labels(part.labels, part.classes, inputs.description))


class Trials(Bench[Step]):
    """Tries candidates.

    Attributes:
        sizes: the model's.
        sample: the pictures.
        placement: the devices, which divide every batch.
        dense_correct: which pictures the dense model has right, once that is known.
    """

    def __init__(
        self,
        config: SweepConfig,
        inputs: Inputs,
        sizes: ViTConfig,
        sample: Sample,
        placement: Placement,
        **options: Any,
    ):
        """Read the weights.

        Args:
            config: how to try.
            inputs: the checkpoint.
            sizes: its sizes, at the wanted resolution.
            sample: the pictures.
            placement: the devices.
            **options: of `Bench`.
        """

        def weights(sizes: ViTConfig) -> Any:
            return fitted_parameters(inputs.checkpoint, sizes)

        super().__init__(config.compute, weights, seconds=config.seconds, **options)
        self.sizes, self.sample, self.placement = sizes, sample, placement
        self.dense_correct: Bool[np.ndarray, " n"] | None = None
        self._counts: tuple[Reducer, list[BlockCounts]] | None = None
        self.parameters(sizes)

    def compile(self, model: ViT, batch: int) -> Step:
        """Compile the scoring of a batch."""
        return compile_step(model, batch, self.placement)

    def with_budgets(self, candidate: Candidate) -> Reducer:
        """Give a candidate's method the budgets that its pictures need; others stay as they are.

        Raises:
            RuntimeError: if the device runs out of memory.
        """
        if candidate.percentile is None:
            return candidate.reducer
        free, size = candidate.reducer, self.sample.batch_size
        if self._counts is None or self._counts[0] != free:
            model, batches = self.model(self.sizes, free), self.sample.batches
            counts = measure(model, batches, batch_size=size, placement=self.placement)
            self._counts = free, counts
        return propose(
            as_budgeted(free), self.sizes, self._counts[1], percentile=candidate.percentile
        )

    def row(self, candidate: Candidate, reducer: Reducer) -> Trial:
        """Give a candidate's row with what needs no measuring.

        Args:
            candidate: what is tried.
            reducer: its method, with budgets.
        """
        return Trial(
            **describe_configuration(self.sizes, reducer),
            batch=self.sample.batch_size,
            dtype=self.compute.dtype,
            gflops=count_flops(self.sizes, reducer) / 1e9,
            tried=candidate.tried,
            devices=self.placement.devices,
        )

    def measure(self, candidate: Candidate, reducer: Reducer) -> Trial:
        """Score the sample, and time a batch in turns with the dense model.

        Args:
            candidate: what is tried; the dense model must be the first.
            reducer: its method, with budgets.

        Raises:
            FloatingPointError: if logits are not finite.
            RuntimeError: if the device runs out of memory.
        """
        dense, size = reducer.name == DENSE, self.sample.batch_size
        step = self.program(self.sizes, reducer, size)
        tally, correct = self._score(step)
        if dense:
            self.dense_correct = correct
        others = {} if dense else {DENSE: self._work(self.program(self.sizes, Reducer(), size))}
        speed = self.time(self._work(step), others, batch=size)
        ratios = speed.ratios.get(DENSE, [1.0])
        drop, error = paired_difference(self.dense_correct, correct)
        return replace(
            self.row(candidate, reducer),
            throughput=speed.throughput,
            top1=tally.totals.percent(tally.totals.correct),
            drop=drop,
            drop_error=error,
            speedup=1.0 if dense else speed.over(DENSE),
            speedup_range=[min(ratios), max(ratios)],
            report=tally.totals.report,
            correct="".join("01"[int(right)] for right in correct),
        )

    def _score(self, step: Step) -> tuple[Tally, Bool[np.ndarray, " n"]]:
        """Score the sample: the sums, and which pictures are right."""
        tally, sample = Tally(), self.sample
        sharding = BatchSharding(len(sample.labels), sample.batch_size)
        score(step, sample.batches, sample.labels, tally, sharding, self.placement.shard_batch)
        if count := tally.totals.not_finite:
            raise FloatingPointError(f"the logits of {count} pictures are not finite numbers")
        return tally, np.concatenate([rows.top1 == rows.labels for rows in tally.rows])

    def _work(self, step: Step) -> Work:
        """Make the first batch something to time."""
        pixels = self.placement.shard_batch(self.sample.batches[0].pixels)
        labels = self.placement.shard_batch(np.zeros(len(pixels), np.int32))
        return device_work(lambda: step(pixels, labels))


def paired_difference(
    before: Bool[np.ndarray, " n"] | None, after: Bool[np.ndarray, " n"]
) -> tuple[float, float]:
    """Compare two models on the same pictures.

    Most pictures are right or wrong under both, so the difference is known far better than either
    accuracy.

    Args:
        before: which pictures the first has right.
        after: which ones the second has.

    Returns:
        The accuracy lost, in percentage points, and its standard error as a mean over pictures.
    """
    if before is None:
        raise ValueError("the dense model has not been measured")
    lost = 100.0 * (before.astype(float) - after.astype(float))
    spread = lost.std(ddof=1) if len(lost) > 1 else 0.0
    return float(lost.mean()), float(spread / len(lost) ** 0.5)
