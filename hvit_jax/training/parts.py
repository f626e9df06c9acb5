"""What a run consists of, and what reports on it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import jax

from hvit_jax.data.folder import ImageFolder
from hvit_jax.data.source import Source
from hvit_jax.distributed.peers import NoPeers, Peers
from hvit_jax.distributed.placement import Placement
from hvit_jax.training.progress import Bars, Reporter
from hvit_jax.training.records import Records, Unwritten
from hvit_jax.training.trainer import Trainer
from hvit_jax.training.validation import Validation


@dataclass(frozen=True)
class Run:
    """What a run consists of."""

    options: argparse.Namespace
    output: Path
    folder: ImageFolder
    pictures: Source | None
    trainer: Trainer
    placement: Placement
    total_steps: int
    peers: Peers | NoPeers

    @property
    def writes(self) -> bool:
        """Whether this process writes and prints for all of them."""
        return self.peers.index == 0


def make_reporter(run: Run, bars: Bars, records: Records | Unwritten) -> Reporter:
    """Make what reports on a run, and validates on the way."""
    return Reporter(
        bars,
        records,
        _validation(run),
        result=run.trainer.result,
        pictures=len(run.folder),
        batch_size=run.options.batch_size,
        total_steps=run.total_steps,
        every=run.options.val_every,
    )


def _validation(run: Run) -> Validation | None:
    if run.pictures is None:
        return None
    # As many pictures at once as a step takes: what trains in memory also validates.
    size = run.options.batch_size // run.options.accumulate
    return Validation(
        run.pictures, run.folder.classes, run.trainer, run.placement, size, run.options.workers
    )


def summarize(run: Run, first: int) -> str:
    """Say in a line what a run is about to do.

    Args:
        run: the run.
        first: the step that it starts from.
    """
    devices = run.placement.devices
    on = f"{devices} x " if devices > 1 else ""
    validated = f"validated on {len(run.pictures)}; " if run.pictures else ""
    return (
        f"{len(run.folder)} pictures, {len(run.folder.classes)} classes; {validated}"
        f"{run.total_steps} steps of {run.options.batch_size} from step {first} on {on}"
        f"{jax.local_devices()[0].device_kind}"
    )
