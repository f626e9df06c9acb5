"""Other ways to run the same dense model: how they are timed, and how the fastest is found."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from hvit_jax.errors import InputError, first_line
from hvit_jax.profiling.device import Work, time_in_turns

# Logits of the two may differ by this share of their standard deviation, in the root mean square.
_TOLERANCES = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 0.1, "float8": 0.5}


@dataclass(frozen=True)
class Rival:
    """One way to run the dense model elsewhere."""

    name: str  # Whose it is, precision and mode.
    work: Work  # The forward pass of the batch.
    single: Work  # That of its first image; of another way where that one is faster.


def as_numpy(logits: Any) -> np.ndarray:
    """Read logits of NumPy or PyTorch in float32."""
    return logits if isinstance(logits, np.ndarray) else logits.float().cpu().numpy()


def fastest_rival(
    rivals: Iterable[Rival],
    expected: Float[Array, "B classes"],
    dtype: str,
    *,
    seconds: float,
    latency: bool,
) -> tuple[Rival, list[str]]:
    """Time every way that runs, and give the fastest; and what is wrong with the others.

    Args:
        rivals: the ways; the first has to run.
        expected: our logits for the batch, which theirs must equal.
        dtype: what ours were computed in.
        seconds: how long to measure each, about.
        latency: whether to find the fastest for a single image too, which may be another.

    Raises:
        InputError: if the logits differ.
        RuntimeError, MemoryError: if the first does not run.
    """
    running, problems = [], []
    for rival in rivals:
        try:
            theirs = as_numpy(rival.work.start())
        except Exception as error:  # torch.compile fails in many ways; eager runs go on.
            if not running and isinstance(error, RuntimeError | MemoryError):
                raise
            problem = f"{rival.name} does not run: {first_line(error)}"
            if not running:  # ONNX Runtime's errors are of no common kind.
                raise RuntimeError(problem) from error
            problems.append(problem)
            continue
        ours = np.asarray(expected, np.float32)
        off = np.sqrt(np.square(theirs - ours).mean()) / ours.std()
        # JAX's own float32 products are rounded to TF32 on a GPU.
        tf32 = dtype == "float32" and jax.default_backend() == "gpu"
        if not off <= _TOLERANCES["tf32" if tf32 else dtype]:
            raise InputError(f"logits of {rival.name} differ by {off:.2g} standard deviations")
        running.append(rival)

    def fastest(works: Sequence[Work]) -> int:
        medians = [*map(statistics.median, time_in_turns(works, seconds=seconds, rounds=3))]
        return medians.index(min(medians))

    best = running[fastest([rival.work for rival in running])]
    if latency:
        singles = [rival.single for rival in running]
        best = dataclasses.replace(best, single=singles[fastest(singles)])
    return best, problems
