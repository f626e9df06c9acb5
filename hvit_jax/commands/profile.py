"""`python profile.py` and `hvit profile`: what a reduction method gains on this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.commands.flags import parse
from hvit_jax.profiling import ProfileConfig, profile
from hvit_jax.system.run import run

PROGRAM = "hvit profile"
DESCRIPTION = """Measure what a token reduction method gains on this machine: GFLOPs, latency,
throughput, memory and compile time, beside the dense model in the same run. Weights are random
unless --checkpoint is given; speed does not depend on them."""
SOME_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `hvit profile --help`.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 1 if rows failed; 2 after a user's mistake; 130 or 143 where Ctrl-C or SIGTERM ended it.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> int:
    config = parse(ProfileConfig, arguments, program=PROGRAM, description=DESCRIPTION)
    rows = profile(config)
    return SOME_FAILED if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
