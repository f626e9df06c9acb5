"""`hvit visualize`: pictures of what a method does with a picture's patches."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.commands import flags
from hvit_jax.system.run import run
from hvit_jax.visualization import VisualizeConfig, visualize

PROGRAM = "hvit visualize"
DESCRIPTION = """Draw which patches of a picture a method treats as one: groups in their mean
colour with outlines, dropped patches dark, and what CLS attends to as a heat map. Without
--checkpoint the bundled demo's model looks at the pictures; -r 128 gives it 32 x 32 patches. For
act and smyrf, which keep all tokens, the groups are those of the queries in the first head."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    return run(lambda: _main(words), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    config = flags.parse(VisualizeConfig, arguments, program=PROGRAM, description=DESCRIPTION)
    visualize(config)
    print(f"written: {config.output}")
