"""`hvit sweep`: which method and setting to use, on your pictures and device."""

from __future__ import annotations

from hvit_jax.commands.flags import command
from hvit_jax.sweeping import SweepConfig, sweep

PROGRAM = "hvit sweep"
DESCRIPTION = """Try settings of all methods on a sample of your pictures, on all devices of this
machine, beside the dense model; print the Pareto front of accuracy and speed, and name the setting
to use. Without DATA and --checkpoint it tries them on the bundled demo."""
NOT_REACHED = 1  # Exit status: no setting reaches the goal.


def _sweep(config: SweepConfig) -> int:
    return 0 if sweep(config).reached else NOT_REACHED


main = command(PROGRAM, SweepConfig, _sweep, DESCRIPTION)
