"""How good maps are: overlap of segments, and errors of depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Integer, Num

IGNORED = 255  # The label of pixels that do not count.


@dataclass(frozen=True)
class Segmentation:
    """Mean intersection over union, and accuracies.

    What is added up over pictures is, of each class, the pixels where prediction and truth agree,
    those predicted, and those of the truth. Pixels of the label 255 do not count, nor do labels of
    no class, in truth or prediction.

    Attributes:
        classes: their names.
    """

    classes: tuple[str, ...]

    def measure(
        self, prediction: Integer[np.ndarray, "H W"], truth: Integer[np.ndarray, "H W"]
    ) -> Int[np.ndarray, "3 n"]:
        """Count a picture's pixels: agreeing, predicted, true, for every class."""
        known = truth != IGNORED
        prediction, truth = prediction[known], truth[known]
        agree = prediction[prediction == truth]
        return np.stack([self._count(labels) for labels in (agree, prediction, truth)])

    def _count(self, labels: Integer[np.ndarray, " pixels"]) -> Int[np.ndarray, " n"]:
        outputs = len(self.classes)
        return np.bincount(labels[(labels >= 0) & (labels < outputs)], minlength=outputs)

    def scores(self, total: Num[np.ndarray, "3 n"], pictures: int) -> dict[str, Any]:
        """Make scores, in per cent, of the sum over pictures; None for what has no pixels.

        Returns:
            `miou`, `macc`, `aacc`, and under `classes` the `iou`, `acc` and `pixels` of each. A
            class that is neither true nor predicted has no IoU, one that is only predicted 0.
        """
        agree, predicted, true = np.asarray(total, float)
        iou, acc = _shares(agree, predicted + true - agree), _shares(agree, true)
        rows = zip(self.classes, iou, acc, true, strict=True)
        return {
            "miou": _mean(iou),
            "macc": _mean(acc),
            "aacc": _percent(float(_shares(agree.sum(), true.sum()))),
            "classes": [
                {"name": name, "iou": _percent(one), "acc": _percent(other), "pixels": int(pixels)}
                for name, one, other, pixels in rows
            ],
        }

    def running(self, total: Num[np.ndarray, "3 n"], pictures: int) -> str:
        """Put the running scores in a few words."""
        scores = self.scores(total, pictures)
        known = [f"{name} {scores[key]:.2f}" for key, name in _SHOWN if scores[key] is not None]
        return " ".join(known)


_SHOWN = (("miou", "mIoU"), ("aacc", "aAcc"))


def _shares(part: Any, whole: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.divide(part, whole)


def _mean(shares: Float[np.ndarray, " n"]) -> float | None:
    known = shares[~np.isnan(shares)]
    return _percent(float(known.mean())) if known.size else None


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * float(share)


@dataclass(frozen=True)
class Depth:
    """Errors of depth, as Eigen et al. 2014 (arXiv 1406.2283) measure them.

    Each is that of a picture, averaged over pictures, as DINOv2's evaluation does. Pixels count
    whose true depth lies within the range.

    Attributes:
        least: the smallest depth, in metres; predictions below are raised to it.
        most: the largest.
    """

    least: float = 0.001
    most: float = 80.0

    def measure(
        self, prediction: Float[np.ndarray, "H W"], truth: Float[np.ndarray, "H W"]
    ) -> Float[np.ndarray, " 4"]:
        """Give a picture's RMSE, AbsRel, delta1, and 1; zeros if no pixel counts."""
        known = (truth > self.least) & (truth < self.most)
        if not known.any():
            return np.zeros(4)
        found = prediction[known].astype(np.float64).clip(self.least, self.most)
        true = truth[known].astype(np.float64)
        error = found - true
        near = np.maximum(found / true, true / found) < 1.25
        return np.array(
            [np.sqrt((error**2).mean()), (np.abs(error) / true).mean(), near.mean(), 1.0]
        )

    def scores(self, total: Float[np.ndarray, " 4"], pictures: int) -> dict[str, Any]:
        """Make scores of the sum over pictures; None if no pixel counted.

        Returns:
            `rmse` in metres, `abs_rel`, and `delta1`, the share of pixels that are wrong by less
            than a quarter; None for what is no number.
        """
        *sums, measured = np.asarray(total, float)
        values = [each / measured if measured and np.isfinite(each) else None for each in sums]
        return dict(zip(("rmse", "abs_rel", "delta1"), values, strict=True))

    def running(self, total: Float[np.ndarray, " 4"], pictures: int) -> str:
        """Put the running scores in a few words."""
        rmse = self.scores(total, pictures)["rmse"]
        return "" if rmse is None else f"RMSE {rmse:.3f}"


Metric = Segmentation | Depth


def class_names(count: int, names: Sequence[str]) -> tuple[str, ...]:
    """Name classes by their numbers where their names are not known."""
    return tuple(names) if names else tuple(map(str, range(count)))
