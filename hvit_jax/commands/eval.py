"""`hvit eval`, also `python eval.py`: accuracy and speed of a checkpoint on labelled pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from hvit_jax.commands.flags import parse, value_of
from hvit_jax.distributed.together import run_together
from hvit_jax.errors import InputError
from hvit_jax.evaluation import EvalConfig, evaluate
from hvit_jax.evaluation.results import read_results
from hvit_jax.evaluation.verify import print_verification, repeated
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
    return run(lambda: _main(words), PROGRAM)


def _main(words: Sequence[str]) -> int | None:
    recorded = base = None
    if (path := value_of("--verify", words, PROGRAM)) is not None:
        # Before the evaluation, whose --output may replace the file.
        recorded = read_results(Path(path))
        base = repeated(Path(path), recorded)
    config = read(words, base)
    return run_together(lambda: _evaluate(config, recorded), config.processes, PROGRAM)


def read(arguments: Sequence[str], base: EvalConfig | None = None) -> EvalConfig:
    """Read a command line, without the program's name.

    With a `base`, that evaluation is repeated; what is given besides wins.

    Raises:
        InputError: for anything in it that is wrong.
    """
    config = parse(EvalConfig, arguments, PROGRAM, _DESCRIPTION, base=base)
    if base is not None and config.reducer is not base.reducer:
        raise InputError(
            "--verify repeats the method in its file; leave out --method and its options"
        )
    return config


def _evaluate(config: EvalConfig, recorded: dict[str, Any] | None) -> int:
    results = evaluate(config)
    if recorded is None or jax.process_index():
        return 0
    return 0 if print_verification(plain_console(), recorded, results) else DIFFERS
