"""Adding up what the batches came to, consistent whenever an evaluation is interrupted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from hvit_jax.evaluation.step import Outputs
from hvit_jax.ops.arrays import Anywhere


@dataclass(frozen=True)
class Done:
    """How many pictures are done, and how long it took, whatever came of them."""

    images: int = 0
    unreadable: int = 0  # Pictures that could not be read, which no other count includes.
    not_finite: int = 0  # Pictures of which the model's numbers are not all finite.
    seconds: float = 0.0  # From the first of them in hand to the last one done, of all runs.
    waited: float = 0.0  # The part of them in which the program waited for pictures.

    @property
    def pictures(self) -> int:
        """Pictures done, whether they could be read or not."""
        return self.images + self.unreadable

    def per_second(self, count: int) -> float | None:
        """Divide by the time, which does not include compiling and the start of workers."""
        return count / self.seconds if self.seconds else None

    @property
    def input_wait(self) -> float | None:
        """Share of the time that went into waiting for pictures."""
        return min(1.0, self.waited / self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Totals(Done):
    """Sums over the pictures scored so far, each counted once; see `Outputs`."""

    correct: int = 0
    correct_top5: int = 0
    loss: float = 0.0
    report: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float | None:
        """Steady speed."""
        return self.per_second(self.images)

    def mean(self, total: float) -> float | None:
        """Divide a sum by the pictures; None if there are none, or it is no number."""
        return total / self.images if self.images and np.isfinite(total) else None

    def percent(self, count: int) -> float | None:
        """Express a count of pictures in per cent of all; None if there are none."""
        return self.mean(100.0 * count)


@dataclass(frozen=True)
class Rows:
    """Single results of neighbouring pictures, without those that could not be read."""

    indices: Int[np.ndarray, " n"]  # Places in the source.
    labels: Int[np.ndarray, "n ..."]
    top1: Int[np.ndarray, " n"]
    logits: Float[np.ndarray, "n classes"] | None
    problems: tuple[str, ...]  # Which pictures could not be read, and why.
    totals: Totals  # Of these pictures and all before them.

    @property
    def correct(self) -> Bool[np.ndarray, " n"]:
        """Tell which pictures' best output is right, or one of the right ones."""
        return (self.top1[:, None] == self.labels.reshape(len(self.labels), -1)).any(-1)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Put rows, at least one part of them, behind each other."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Rows(
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.top1 for part in parts]),
        np.concatenate(logits) if logits else None,
        tuple(problem for part in parts for problem in part.problems),
        parts[-1].totals,
    )


@dataclass
class Tally:
    """What has been scored so far.

    Attributes:
        keep_logits: whether `rows` keeps logits.
        rows: single results, batch by batch; what an earlier run has scored comes first.
    """

    keep_logits: bool = False
    rows: list[Rows] = field(default_factory=list)
    _finished: float | None = None

    @property
    def totals(self) -> Totals:
        """The sums."""
        return self.rows[-1].totals if self.rows else Totals()

    @property
    def skipped(self) -> list[str]:
        """Say which pictures could not be read, and why."""
        return [problem for rows in self.rows for problem in rows.problems]

    def add(
        self, outputs: Outputs, problems: Sequence[str], started: float, waited: float = 0.0
    ) -> None:
        """Add the batch of the pictures that come next.

        Args:
            outputs: its results, as NumPy arrays.
            problems: why pictures could not be read, in their order.
            started: the time when the batch was in hand.
            waited: seconds that the program waited for it.
        """
        old, now = self.totals, time.perf_counter()
        labels, top1, logits = map(np.asarray, (outputs.labels, outputs.top1, outputs.logits))
        valid = labels.reshape(len(labels), -1)[:, 0] >= 0
        images = int(valid.sum())
        totals = Totals(
            images=old.images + images,
            correct=old.correct + int(outputs.correct[valid].sum()),
            correct_top5=old.correct_top5 + int(outputs.correct_top5[valid].sum()),
            loss=old.loss + _sum(outputs.loss, valid),
            not_finite=old.not_finite + images - int(outputs.finite[valid].sum()),
            unreadable=old.unreadable + len(problems),
            report={
                name: old.report.get(name, 0.0) + _sum(values, valid)
                for name, values in outputs.report.items()
            },
            seconds=old.seconds + now - (started if self._finished is None else self._finished),
            waited=old.waited + waited,
        )
        indices, logits = old.pictures + np.flatnonzero(valid), logits[valid]
        rows = Rows(
            indices,
            labels[valid],
            top1[valid],
            logits if self.keep_logits else None,
            tuple(problems),
            totals,
        )
        self._finished = now
        self.rows.append(rows)  # An interrupt finds either all of the batch or nothing of it.

    def pack(self, rows: Sequence[Rows]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Join rows, and write them as arrays and what JSON can hold."""
        joined = join_rows(rows)
        values = vars(joined).items()
        arrays = {name: value for name, value in values if isinstance(value, np.ndarray)}
        return arrays, {"totals": dataclasses.asdict(joined.totals), "problems": joined.problems}

    def unpack(self, arrays: Mapping[str, np.ndarray], about: dict[str, Any]) -> Rows:
        """Read what `pack` wrote."""
        indices, labels, top1 = (arrays[name] for name in ("indices", "labels", "top1"))
        logits = arrays["logits"] if self.keep_logits else None
        totals = Totals(**about["totals"])
        return Rows(indices, labels, top1, logits, tuple(about["problems"]), totals)


def _sum(values: Float[Anywhere, " B"], valid: Bool[np.ndarray, " B"]) -> float:
    return float(np.sum(values[valid], dtype=np.float64))
