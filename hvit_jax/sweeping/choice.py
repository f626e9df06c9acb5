"""Which setting to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvit_jax.system.figures import pareto_front

Row = dict[str, Any]
# Speed-ups are rarely above what GFLOPs promise; below this part of the target nothing is missed.
NEAR = 0.75


@dataclass(frozen=True)
class Goal:
    """What is wanted; at most one of the two.

    Attributes:
        speedup: at least this many times the dense model's images per second.
        drop: at most this much top-1 lost, in percentage points.
    """

    speedup: float | None = None
    drop: float | None = None

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"{self.speedup:g} x dense"
        return f"a drop of at most {self.drop:g}"

    def reached(self, row: Row) -> bool:
        """Tell whether a measured candidate is good enough, and faster than dense."""
        if self.speedup is not None:
            return row["speedup"] >= self.speedup
        return row["drop"] <= (self.drop or 0.0) and row["speedup"] > 1

    def hopeless(self, flops: int, dense: int) -> str | None:
        """Say why a candidate need not be tried, if so.

        Args:
            flops: its multiply-adds.
            dense: those of the dense model.
        """
        if flops >= dense:
            return "as many GFLOPs as dense, or more"
        least = NEAR * (self.speedup or 0.0)
        if dense / flops < least:
            return f"GFLOPs promise less than {least:.2f} x dense, {NEAR:g} of the target"
        return None


def front(rows: Sequence[Row]) -> list[Row]:
    """Find the candidates that no other beats in both speed and accuracy, from the fastest on."""
    measured = [row for row in rows if row["error"] is None]
    places = {place(row): row for row in reversed(measured)}
    return [places[point] for point in pareto_front(list(places))]


def place(row: Row) -> tuple[float, float]:
    """Locate a candidate: speed over dense, and top-1."""
    return row["speedup"], row["top1"]


def choose(rows: Sequence[Row], goal: Goal) -> tuple[Row | None, bool]:
    """Choose a setting.

    For a speed the most accurate one that reaches it, for a drop the fastest one within it. Where
    none is, the nearest: the fastest of all, or the one that is faster than dense and loses least.

    Args:
        rows: measured candidates, the dense model among them.
        goal: what is wanted.

    Returns:
        The setting, None if nothing is faster than dense; and whether it reaches the goal.
    """
    measured = [row for row in rows if row["error"] is None]
    good = [row for row in measured if goal.reached(row)]
    if good:
        by_accuracy = goal.speedup is not None
        return max(good, key=lambda row: place(row)[::-1] if by_accuracy else place(row)), True
    faster = [row for row in measured if row["speedup"] > 1]
    if goal.speedup is not None:
        return max(faster, key=place, default=None), False
    return min(faster, key=lambda row: (row["drop"], -row["speedup"]), default=None), False
