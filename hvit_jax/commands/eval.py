"""`hvit eval`, also `python eval.py`: accuracy and speed of a checkpoint on labelled pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from hvit_jax.commands.flags import parse, value_of
from hvit_jax.distributed.together import run_together
from hvit_jax.errors import InputError
from hvit_jax.evaluation import EvalConfig, evaluate
from hvit_jax.evaluation.verify import print_verification, read_results, repeated
from hvit_jax.system.progress import plain_console
from hvit_jax.system.run import run

PROGRAM = "hvit eval"
_DESCRIPTION = """Measure accuracy and speed of a checkpoint on labelled pictures, dense or under a
token reduction method. With neither DATA nor --checkpoint the bundled demo runs."""
DIFFERS = 1  # Exit status.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, without the program's name; default: the process's own.

    Returns:
        0; 1 if --verify finds differences; 2 after a user's mistake; 130 or 143 where Ctrl-C or
        SIGTERM ended it early.
    """
    words = sys.argv[1:] if arguments is None else arguments
    return run(lambda: _main(read(words)), PROGRAM)


def read(arguments: Sequence[str]) -> EvalConfig:
    """Read a command line, without the program's name.

    With --verify the file's evaluation is repeated; what is given besides wins.

    Raises:
        InputError: for anything in it that is wrong.
    """
    path = value_of("--verify", arguments, PROGRAM)
    base = None if path is None else repeated(Path(path))
    config = parse(EvalConfig, arguments, PROGRAM, _DESCRIPTION, base=base)
    if base is not None and config.reducer is not base.reducer:
        raise InputError(
            "--verify repeats the method that its file names; leave --method out, and its options"
        )
    return config


def _main(config: EvalConfig) -> int | None:
    return run_together(lambda: _evaluate(config), config.processes, PROGRAM)


def _evaluate(config: EvalConfig) -> int:
    # Read first: --output may replace the file.
    recorded = None if config.verify is None else read_results(config.verify)
    results = evaluate(config)
    if recorded is None or jax.process_index():
        return 0
    console = plain_console()
    return 0 if print_verification(console, recorded, results) else DIFFERS
