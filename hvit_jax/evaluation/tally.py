"""Adding up what the batches came to, consistent whenever an evaluation is interrupted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from hvit_jax.data.loader import Batch
from hvit_jax.evaluation.step import Anywhere, Outputs


@dataclass(frozen=True)
class Totals:
    """Sums over the pictures scored so far, each counted once.

    Attributes:
        images: pictures scored.
        correct: those whose largest logit is the label's.
        correct_top5: those whose label is among the five largest.
        loss: summed cross entropy.
        not_finite: pictures with a logit that is no number.
        unreadable: pictures that could not be read, which no other count includes.
        report: sums of what the method reports.
        batches: batches that these sums hold; what an earlier run saved at once counts as one.
        seconds: from the first batch in hand to the last one done, of all runs.
        waited: the part of them in which the program waited for pictures.
        finished: when this run's last batch was done; None before.
    """

    images: int = 0
    correct: int = 0
    correct_top5: int = 0
    loss: float = 0.0
    not_finite: int = 0
    unreadable: int = 0
    report: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    finished: float | None = None

    @property
    def pictures(self) -> int:
        """Pictures done, whether they could be read or not."""
        return self.images + self.unreadable

    @property
    def images_per_second(self) -> float | None:
        """Steady speed, from the first batch in hand: without compilation and start of workers."""
        return self.images / self.seconds if self.seconds else None

    @property
    def input_wait(self) -> float | None:
        """Share of the time from the first batch in hand that went into waiting for pictures."""
        return min(1.0, self.waited / self.seconds) if self.seconds else None

    def mean(self, total: float) -> float | None:
        """Divide a sum by the pictures; None if there are none, or it is no number."""
        return total / self.images if self.images and np.isfinite(total) else None

    def percent(self, count: int) -> float | None:
        """Express a count of pictures in per cent of all; None if there are none."""
        return self.mean(100.0 * count)


@dataclass(frozen=True)
class Rows:
    """Single results of a batch's pictures, without padding and unreadable ones.

    Attributes:
        indices: places in the source.
        labels: the right classes.
        top1: the classes found.
        logits: all logits, if they were asked for.
        problems: the pictures that could not be read, and why.
    """

    indices: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    top1: Int[np.ndarray, " n"]
    logits: Float[np.ndarray, "n classes"] | None
    problems: tuple[str, ...]


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Put the rows of batches, at least one, behind each other."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Rows(
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.top1 for part in parts]),
        np.concatenate(logits) if logits else None,
        tuple(problem for part in parts for problem in part.problems),
    )


@dataclass
class Tally:
    """What has been scored so far.

    Attributes:
        keep_logits: whether `rows` keeps logits.
        totals: the sums.
        first: pictures that an earlier run scored; batches count on from there.
    """

    keep_logits: bool = False
    totals: Totals = field(default_factory=Totals)
    first: int = 0
    _rows: list[Rows] = field(default_factory=list)

    @property
    def rows(self) -> list[Rows]:
        """Single results of the batches in `totals`."""
        return self._rows[: self.totals.batches]

    @property
    def skipped(self) -> list[str]:
        """Say which pictures could not be read, and why."""
        return [problem for rows in self.rows for problem in rows.problems]

    def restore(self, parts: Sequence[tuple[Rows, Totals]]) -> None:
        """Take over what an earlier run has scored.

        Args:
            parts: rows in order, with the sums until the end of each; at least one.
        """
        self._rows = [rows for rows, _ in parts]
        totals = parts[-1][1]
        self.totals = replace(totals, batches=len(parts), finished=None)
        self.first = totals.pictures

    def add(
        self,
        batch: Batch,
        labels: Int[np.ndarray, " B"],
        outputs: Outputs,
        started: float,
        waited: float = 0.0,
    ) -> None:
        """Add a batch.

        Args:
            batch: the batch.
            labels: its labels.
            outputs: its results, as NumPy arrays.
            started: the time when the batch was in hand.
            waited: seconds that the program waited for it.
        """
        valid = batch.valid
        indices = np.full(len(valid), -1)
        indices[: len(batch.indices)] = self.first + np.array(batch.indices, int)
        logits = np.asarray(outputs.logits)[valid] if self.keep_logits else None
        problems = tuple(batch.problems[row] for row in sorted(batch.problems))
        self._rows.append(
            Rows(indices[valid], labels[valid], np.asarray(outputs.top1)[valid], logits, problems)
        )
        # One assignment, so that an interrupt finds either all of the batch or nothing of it.
        self.totals = _plus(self.totals, batch, outputs, started, waited)


def _plus(old: Totals, batch: Batch, new: Outputs, started: float, waited: float) -> Totals:
    now, valid = time.perf_counter(), batch.valid
    images = int(valid.sum())
    since = started if old.finished is None else old.finished
    return Totals(
        images=old.images + images,
        correct=old.correct + int(new.correct[valid].sum()),
        correct_top5=old.correct_top5 + int(new.correct_top5[valid].sum()),
        loss=old.loss + _sum(new.loss, valid),
        not_finite=old.not_finite + int((~new.finite)[valid].sum()),
        unreadable=old.unreadable + len(batch.problems),
        report={
            name: old.report.get(name, 0.0) + _sum(values, valid)
            for name, values in new.report.items()
        },
        batches=old.batches + 1,
        seconds=old.seconds + now - since,
        waited=old.waited + waited,
        finished=now,
    )


def _sum(values: Float[Anywhere, " B"], valid: Bool[np.ndarray, " B"]) -> float:
    return float(np.sum(np.asarray(values)[valid], dtype=np.float64))
