"""`hvit compare`: methods compared on your pictures and device, and the setting to use."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.commands.flags import parse, value_of
from hvit_jax.comparing import CompareConfig, compare
from hvit_jax.comparing.run import PROGRAM
from hvit_jax.comparing.verify import recorded_config, verify
from hvit_jax.system.run import run

DESCRIPTION = """Compare methods on a sample of your pictures, on all devices of this machine, at
several shares of the dense model's cost, beside the dense model and dense at a lower resolution:
accuracy or mIoU, or agreement with dense where there are no labels, speed and memory; and name the
setting to use. Without DATA and --checkpoint it compares them on the bundled demo."""
FAILS = 1  # Exit status: no setting reaches the goal, or a file's scores are not found again.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, without the program's name; default: the process's own.

    Returns:
        0; 1 if no setting reaches the goal that was named, or --verify finds differences; 2 after a
        user's mistake; 130 or 143 where Ctrl-C or SIGTERM ended it early.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return run(lambda: _main(words), PROGRAM)


def _main(words: Sequence[str]) -> int:
    base = None
    if (path := value_of("--verify", words, PROGRAM)) is not None:
        base = recorded_config(path)
    config = parse(CompareConfig, words, PROGRAM, DESCRIPTION, base=base)
    if config.verify is not None:
        return 0 if verify(config) else FAILS
    done = compare(config)
    asked = config.target_speedup is not None or config.max_drop is not None
    return FAILS if asked and not done.reached else 0
