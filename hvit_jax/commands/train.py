"""`hvit train`: train a vision transformer on a folder of pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.commands.flags import parse
from hvit_jax.distributed.together import run_together
from hvit_jax.system.run import run
from hvit_jax.training import TrainConfig, train

PROGRAM = "hvit train"
_DESCRIPTION = """Train or fine-tune a vision transformer on class folders of pictures, on all
devices of this machine. OUTPUT/checkpoint, the result, loads with hvit_jax.load and hvit eval;
OUTPUT/metrics.csv and validation.csv have the run's numbers. A run that was stopped or killed goes
on from its newest state with the same command and --resume. Recipes: docs/training.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""

    def command() -> int | None:
        words = sys.argv[1:] if arguments is None else arguments
        config = parse(TrainConfig, words, program=PROGRAM, description=_DESCRIPTION)
        return run_together(lambda: _train(config), config.processes, PROGRAM)

    return run(command, PROGRAM)


def _train(config: TrainConfig) -> None:
    train(config)
