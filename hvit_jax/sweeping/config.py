"""What `hvit sweep` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.data.labels import Labelling
from hvit_jax.errors import InputError, unknown
from hvit_jax.evaluation.config import Classifying, OnPictures
from hvit_jax.fields import nested, option
from hvit_jax.models.reducer import Reducer
from hvit_jax.reducers import REDUCERS
from hvit_jax.sweeping.choice import Goal
from hvit_jax.system.figures import FORMATS

METHODS = tuple(name for name in REDUCERS if name != Reducer.name)


@dataclass(frozen=True)
class SweepConfig(OnPictures):
    """What to try, and how; every field is a flag of `hvit sweep`."""

    labelling: Labelling = nested(Labelling)
    classifying: Classifying = nested(Classifying)
    target_speedup: float | None = option(
        None,
        "name the most accurate setting with at least X times the dense model's images/s",
        above=1,
        most=1000,
    )
    max_drop: float | None = option(
        None,
        "name the fastest setting that loses at most so many percentage points of top-1",
        least=0,
        most=100,
        metavar="POINTS",
    )
    methods: tuple[str, ...] = option(METHODS, "methods to try beside dense", metavar="LIST")
    all: bool = option(
        False, "also try settings that cannot reach the goal by their GFLOPs, skipped otherwise"
    )
    pictures: int = option(1000, "size of the sample, taken at even distances over DATA", least=2)
    seconds: float = option(
        0.5, "length of each of the five rounds of timing, about", above=0, most=3600, metavar="S"
    )
    output: Path | None = option(
        None,
        "write every candidate as soon as it is finished",
        short="-o",
        metavar="FILE.json",
        ends=(".json",),
    )
    resume: bool = option(False, "continue with the candidates of --output")
    plot: Path | None = option(
        None, "draw accuracy against speed", metavar="FILE.png", ends=FORMATS
    )

    def __post_init__(self):
        super().__post_init__()
        if self.target_speedup is not None and self.max_drop is not None:
            raise InputError("give --target-speedup X or --max-drop POINTS, not both")
        if not self.methods:
            raise InputError("--methods names no method")
        for method in self.methods:
            if method == Reducer.name:
                raise InputError("--methods lists what to try beside dense, which is always tried")
            if method not in REDUCERS:
                raise unknown("method", method, METHODS)

    @property
    def goal(self) -> Goal | None:
        """What is wanted; None to see the front only."""
        if self.target_speedup is None and self.max_drop is None:
            return None
        return Goal(self.target_speedup, self.max_drop)
