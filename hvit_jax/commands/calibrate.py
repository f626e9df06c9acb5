"""`hvit calibrate`: what budgets a method needs on your pictures."""

from __future__ import annotations

from hvit_jax.calibration import CalibrateConfig, calibrate
from hvit_jax.commands.flags import command

PROGRAM = "hvit calibrate"
DESCRIPTION = """Measure, block by block, how many tokens (ats) or clusters (act) your pictures
need, and propose budgets for them. Without DATA and --checkpoint it measures the bundled demo."""


def _calibrate(config: CalibrateConfig) -> None:
    calibrate(config)


main = command(PROGRAM, CalibrateConfig, _calibrate, DESCRIPTION)
