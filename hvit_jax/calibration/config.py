"""What `hvit calibrate` is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hvit_jax.config import Compute
from hvit_jax.evaluation.inputs import check_both_or_neither
from hvit_jax.fields import Options, nested, option
from hvit_jax.models.reducer import Reducer
from hvit_jax.reducers import ATS


@dataclass(frozen=True)
class CalibrateConfig(Options):
    """What to measure budgets for, and how; `hvit calibrate --help` explains every field."""

    data: str | None = option(
        None, "a folder of class folders, or tfds:NAME[:SPLIT]", positional=True
    )
    checkpoint: Path | None = option(
        None, "a folder written by hvit convert or by training", metavar="DIR"
    )
    reducer: Reducer = option(ATS())
    resolution: int | tuple[int, int] | None = option(
        None,
        "picture size in pixels, one number or height,width (default: the checkpoint's)",
        short="-r",
    )
    compute: Compute = nested(Compute, leave=("param_dtype", "unroll", "remat"))
    batch_size: int = option(32, "pictures at once", short="-b", least=1)
    batches: int = option(8, "how many batches to measure, spread over DATA", least=1)
    workers: int = option(
        min(8, os.cpu_count() or 1),
        "processes that decode; 0: threads of this one",
        short="-j",
        least=0,
    )
    percentile: float = option(
        99.0,
        "budgets suffice for this share of the pictures, in per cent",
        above=0,
        most=100,
        metavar="P",
    )
    common: bool = option(
        False,
        "one budget for all blocks, the largest: more work a picture, but far less to compile",
    )
    output: Path | None = option(None, "write budgets and measurements", metavar="FILE.json")

    def __post_init__(self):
        super().__post_init__()
        check_both_or_neither(self.data, self.checkpoint)
