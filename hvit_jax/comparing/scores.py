"""Scores of a sample of pictures, and how far they might lie from those of all pictures.

A score is made of the sum over pictures of what was measured of each, so that it can be taken of
any draw of them. Draws are the same for all settings, and differences between settings are taken
draw by draw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt16

# Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3: the percentile interval.
DRAWS, SEED, CONFIDENCE = 1000, 0, 0.95
_CHUNK = 50  # Draws that are summed at once.


def _percent(sums: Float[np.ndarray, " R"], pictures: int) -> Float[np.ndarray, " R"]:
    return 100 * sums / pictures


def _mean(sums: Float[np.ndarray, " R"], pictures: int) -> Float[np.ndarray, " R"]:
    return sums / pictures


def _miou(sums: Float[np.ndarray, "R 3 n"], pictures: int) -> Float[np.ndarray, " R"]:
    """Take the mean over the classes that a draw has; see `dense.metrics.Segmentation`."""
    agree, predicted, true = sums[:, 0], sums[:, 1], sums[:, 2]
    union = predicted + true - agree
    shares = np.divide(agree, union, out=np.zeros_like(agree), where=union > 0)
    return 100 * shares.sum(1) / np.maximum(1, (union > 0).sum(1))


def _relative(sums: Float[np.ndarray, "R 4"], pictures: int) -> Float[np.ndarray, " R"]:
    """Take the mean over the pictures that have a pixel; see `dense.metrics.Depth`."""
    return 100 * sums[:, 1] / np.maximum(1, sums[:, 3])


def _rmse(sums: Float[np.ndarray, "R 4"], pictures: int) -> Float[np.ndarray, " R"]:
    """Take the mean over the pictures that have a pixel; see `dense.metrics.Depth`."""
    return sums[:, 0] / np.maximum(1, sums[:, 3])


@dataclass(frozen=True)
class Score:
    """One score.

    Attributes:
        title: what it is called in tables.
        form: how it is written.
        of: makes it of sums over pictures, one for each draw, and of how many there are.
        better: 1 if more is better, -1 if less is.
        room: how many points a setting may lose where nobody says so; None: 5 % of the score.
        about: what it means.
    """

    title: str
    form: str
    about: str
    of: Callable[[Any, int], Float[np.ndarray, " R"]] = _percent
    better: int = 1
    room: float | None = 1.0

    def show_change(self, change: float, ends: Sequence[float]) -> tuple[str, str]:
        """Write a difference between two settings, and the interval that it lies in."""
        form = self.form.replace("{:", "{:+")
        return form.format(change), " to ".join(map(form.format, ends))

    @property
    def in_percent(self) -> bool:
        """Tell whether it is a share, in per cent."""
        return self.of in (_percent, _miou, _relative)

    def tolerated(self, dense: float) -> float:
        """Give what a setting may lose where nobody says how much."""
        return 0.05 * abs(dense) if self.room is None else self.room


_AGREE = "the dense model's"
_FEW = 5.0  # Points beside the dense model: what changes is not always for the worse.
SCORES = {
    "top1": Score("top-1 (%)", "{:.1f}", "pictures whose best output is right"),
    "top5": Score("top-5 (%)", "{:.1f}", "pictures with a right one among the five best outputs"),
    "knn": Score(
        "k-NN (%)",
        "{:.1f}",
        "pictures that their nearest neighbours in the sample put into the right class",
    ),
    "miou": Score("mIoU (%)", "{:.2f}", "overlap of segments, averaged over classes", _miou),
    "rmse": Score("RMSE (m)", "{:.4f}", "error of depth, averaged over pictures", _rmse, -1, None),
    "agreement": Score(
        "agreement (%)", "{:.1f}", f"pictures whose best output is {_AGREE}", room=_FEW
    ),
    "pixels": Score("same pixels (%)", "{:.2f}", f"pixels whose class is {_AGREE}", room=_FEW),
    "apart": Score(
        "from dense (%)", "{:.2f}", f"relative error beside {_AGREE} depth", _relative, -1, _FEW
    ),
    "kl": Score(
        "KL divergence", "{:.4f}", f"from {_AGREE} probabilities to the setting's, nats", _mean, -1
    ),
    "cosine": Score("cosine (%)", "{:.2f}", f"of the pooled feature and {_AGREE}", room=_FEW),
    "patches": Score(
        "patches' cosine (%)", "{:.2f}", f"of the features of all patches, put back, and {_AGREE}"
    ),
}


@functools.lru_cache(maxsize=2)
def draws(pictures: int) -> UInt16[np.ndarray, "R pictures"]:
    """Draw as many pictures as there are, with replacement: how often each was drawn."""
    random = np.random.default_rng(SEED)
    found = np.empty((DRAWS, pictures), np.uint16)
    for row in found:
        row[:] = np.bincount(random.integers(pictures, size=pictures), minlength=pictures)
    return found


def value_of(score: Score, values: Shaped[np.ndarray, " N *shape"]) -> float:
    """Make the score of what was measured of every picture."""
    return float(score.of(values.sum(0, dtype=np.float64)[None], len(values))[0])


def values_of_draws(
    score: Score, values: Shaped[np.ndarray, " N *shape"]
) -> Float[np.ndarray, " R"]:
    """Make the score of every draw."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    weights = draws(len(values))
    sums = [
        weights[start : start + _CHUNK].astype(np.float64) @ flat
        for start in range(0, DRAWS, _CHUNK)
    ]
    return score.of(np.concatenate(sums).reshape(DRAWS, *values.shape[1:]), len(values))


def interval(values: Float[np.ndarray, " R"]) -> list[float]:
    """Give the range that holds the middle 95 % of the draws' values."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return [float(end) for end in np.percentile(values, [tail, 100 - tail])]
