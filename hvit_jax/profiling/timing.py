"""How long a function takes on a device that works while Python goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        start: begins the work, and may return before it is done; its result goes to `wait`.
        wait: returns when the result, and so all work before it, is done.
    """

    start: Callable[[], object]
    wait: Callable[[object], object]

    def seconds(self, calls: int) -> float:
        """Time several calls that are enqueued together; the average of one."""
        started = time.perf_counter()
        for _ in range(calls - 1):
            self.start()
        self.wait(self.start())
        return (time.perf_counter() - started) / calls


def device_work(run: Callable[[], object]) -> Work:
    """Time a JAX function by its calls, enqueued on a GPU.

    On a CPU each is waited for: enqueued there, they would run beside each other, as PyTorch's do
    not.
    """
    if jax.default_backend() == "cpu":
        return Work(lambda: jax.block_until_ready(run()), lambda result: None)
    return Work(run, jax.block_until_ready)


def time_in_turns(
    works: Sequence[Work], *, seconds: float, rounds: int = ROUNDS
) -> list[list[float]]:
    """Time several works in turns, so that a machine that grows slower harms all alike.

    Args:
        works: what to time; each is called once before, to warm up.
        seconds: how long a round of one work should take, about.
        rounds: how often each has its turn.

    Returns:
        Seconds of one call, for each work a list of its rounds.
    """
    for work in works:
        work.seconds(1)
    calls = [max(1, round(seconds / work.seconds(1))) for work in works]
    turns = [
        [work.seconds(count) for work, count in zip(works, calls, strict=True)]
        for _ in range(rounds)
    ]
    return [list(of_one) for of_one in zip(*turns, strict=True)]


def time_alone(work: Work, *, seconds: float, least: int = 5, most: int = 200) -> list[float]:
    """Time calls one by one, each waited for: what a single request takes.

    Args:
        work: what to time.
        seconds: when to stop, about.
        least: calls at least.
        most: calls at most.

    Returns:
        Seconds of each call.
    """
    work.seconds(1)
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        times.append(work.seconds(1))
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """Find the value that a share of the values, from 0 to 1, does not exceed."""
    return float(np.quantile(values, share, method="higher"))


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Compare two works that were timed in turns, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Compare two works that were timed in turns: the median of their rounds' ratios."""
    return statistics.median(ratios(above, below))
