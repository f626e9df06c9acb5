"""`hvit calibrate`: what budgets a method needs on your pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.calibration import CalibrateConfig, calibrate
from hvit_jax.commands.flags import parse
from hvit_jax.system.run import run

PROGRAM = "hvit calibrate"
DESCRIPTION = """Measure, block by block, how many tokens (ats) or clusters (act) your pictures
need, and propose budgets for them. Without DATA and --checkpoint it measures the bundled demo."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 2 after a user's mistake.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    calibrate(parse(CalibrateConfig, arguments, program=PROGRAM, description=DESCRIPTION))
