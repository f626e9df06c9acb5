"""Measure one candidate: accuracy on the sample, and speed beside the dense model."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from hvit_jax.calibration.budgets import BlockCounts, measure, propose
from hvit_jax.config import ViTConfig
from hvit_jax.distributed.placement import Placement
from hvit_jax.evaluation.loop import score
from hvit_jax.evaluation.step import Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.parameters import Tree, build_model
from hvit_jax.models.vit import ViT
from hvit_jax.profiling.timing import Work, device_work, ratios, time_in_turns
from hvit_jax.reducers import Reducer, make_reducer
from hvit_jax.sweeping.grid import DENSE, Candidate
from hvit_jax.sweeping.sample import Sample

# What a file has for a candidate that failed.
NOT_MEASURED = dict.fromkeys(
    (
        "top1",
        "drop",
        "drop_error",
        "throughput",
        "speedup",
        "speedup_range",
        "report",
        "correct",
        "error",
    )
)


@dataclass
class Bench:
    """Measures candidates, and keeps what they share.

    Attributes:
        config: the model's sizes.
        parameters: its weights.
        sample: the pictures.
        dtype: what blocks are computed in.
        attention: "auto", "cudnn" or "xla".
        seconds: how long one round of timing takes, about.
        placement: the devices, which share every batch.
        dense_correct: which pictures the dense model has right, once that is known.
    """

    config: ViTConfig
    parameters: Tree
    sample: Sample
    dtype: str
    attention: str
    seconds: float
    placement: Placement
    dense_correct: Bool[np.ndarray, " n"] | None = None

    def __post_init__(self):
        self._dense_step: Step | None = None
        self._counts: tuple[Reducer, list[BlockCounts]] | None = None

    def with_budgets(self, candidate: Candidate) -> Reducer:
        """Give a candidate's method the budgets that its pictures need; others stay as they are.

        Raises:
            RuntimeError: if the device runs out of memory.
        """
        if candidate.percentile is None:
            return candidate.reducer
        free = candidate.reducer
        if self._counts is None or self._counts[0] != free:
            counted = measure(
                self._model(free),
                self.sample.batches,
                batch_size=self.sample.batch_size,
                placement=self.placement,
            )
            self._counts = free, counted
        return propose(free, self.config, self._counts[1], percentile=candidate.percentile)

    def measure(self, reducer: Reducer) -> dict[str, Any]:
        """Score the sample, and time a batch in turns with the dense model.

        Args:
            reducer: a method with its budgets; the dense model must be the first.

        Returns:
            Top-1 in per cent, what it lost against dense on the same pictures and the standard
            error of that, images per second, speed over dense with the range of its rounds,
            reports, and which pictures are right.

        Raises:
            FloatingPointError: if logits are not finite.
            RuntimeError: if the device runs out of memory.
        """
        dense = reducer.name == DENSE
        step = self._dense() if dense else self._step(reducer)
        tally, correct = self._score(step)
        if dense:
            self.dense_correct = correct
        works = [self._work(step)] if dense else [self._work(step), self._work(self._dense())]
        times = time_in_turns(works, seconds=self.seconds)
        compared = ratios(times[-1], times[0])
        lost, error = paired_difference(self.dense_correct, correct)
        return {
            "top1": tally.totals.percent(tally.totals.correct),
            "drop": lost,
            "drop_error": error,
            "throughput": self.sample.batch_size / statistics.median(times[0]),
            "speedup": statistics.median(compared),
            "speedup_range": [min(compared), max(compared)],
            "report": tally.totals.report,
            "correct": "".join("01"[int(right)] for right in correct),
        }

    def _score(self, step: Step) -> tuple[Tally, Bool[np.ndarray, " n"]]:
        tally = Tally()
        put, sample = self.placement.divide, self.sample
        score(step, sample.batches, sample.labels, tally, put=put)
        if tally.totals.not_finite:
            count = tally.totals.not_finite
            raise FloatingPointError(f"the logits of {count} pictures are not finite numbers")
        return tally, np.concatenate([rows.top1 == rows.labels for rows in tally.rows])

    def _work(self, step: Step) -> Work:
        pixels = self.placement.divide(self.sample.batches[0].pixels)
        labels = self.placement.divide(np.zeros(len(pixels), np.int32))
        return device_work(lambda: step(pixels, labels))

    def _dense(self) -> Step:
        if self._dense_step is None:
            self._dense_step = self._step(make_reducer(DENSE).resolve(self.config))
        return self._dense_step

    def _step(self, reducer: Reducer) -> Step:
        return compile_step(self._model(reducer), self.sample.batch_size, self.placement)

    def _model(self, reducer: Reducer) -> ViT:
        dtype = jnp.dtype(self.dtype)
        options = {"dtype": dtype, "param_dtype": dtype, "attention": self.attention}
        return build_model(self.config, reducer, self.parameters, **options)


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
