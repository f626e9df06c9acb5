"""`hvit sweep`: which method and setting to use, on your pictures and device."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.commands.flags import parse
from hvit_jax.sweeping import SweepConfig, sweep
from hvit_jax.system.run import run

PROGRAM = "hvit sweep"
DESCRIPTION = """Try settings of all methods on a sample of your pictures, on all devices of this
machine, beside the dense model; print the Pareto front of accuracy and speed, and name the setting
to use. Without DATA and --checkpoint it tries them on the bundled demo."""
NOT_REACHED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 1 if no setting reaches the goal; 2 after a user's mistake; 130 or 143 where Ctrl-C or
        SIGTERM ended it.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> int:
    found = sweep(parse(SweepConfig, arguments, program=PROGRAM, description=DESCRIPTION))
    return 0 if found.reached else NOT_REACHED


if __name__ == "__main__":
    sys.exit(main())
