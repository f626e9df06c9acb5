"""What `hvit calibrate` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.evaluation.config import OnPictures
from hvit_jax.fields import option
from hvit_jax.reducers import ATS, Reducer, method_of_checkpoint

OTHERWISE = ATS()


@dataclass(frozen=True)
class CalibrateConfig(OnPictures):
    """What to measure budgets for, and how; every field is a flag of `hvit calibrate`."""

    reducer: Reducer | None = method_of_checkpoint(OTHERWISE)
    batches: int = option(8, "how many batches to measure, spread over DATA", least=1)
    percentile: float = option(
        99.0,
        "share of the pictures that budgets suffice for, in per cent",
        above=0,
        most=100,
        metavar="P",
    )
    common: bool = option(
        False,
        "give all blocks the largest budget: more work a picture, but much faster to compile",
    )
    output: Path | None = option(
        None,
        "write budgets and measurements",
        short="-o",
        metavar="FILE.json",
        ends=(".json",),
    )
