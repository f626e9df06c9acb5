"""`hvit train`: train a vision transformer on a folder of pictures."""

from __future__ import annotations

from hvit_jax.commands.flags import command
from hvit_jax.distributed.together import run_together
from hvit_jax.training import TrainConfig, train

PROGRAM = "hvit train"
DESCRIPTION = """Train or fine-tune a vision transformer on class folders of pictures, on all
devices of this machine. OUTPUT/checkpoint, the result, loads with hvit_jax.load and hvit eval;
OUTPUT/metrics.csv and validation.csv have the run's numbers. The same command with --resume
continues a run that was stopped or killed. Recipes: docs/training.md."""


def _train(config: TrainConfig) -> int | None:
    def together() -> None:
        train(config)

    return run_together(together, config.processes, PROGRAM)


main = command(PROGRAM, TrainConfig, _train, DESCRIPTION)
