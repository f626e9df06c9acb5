"""`hvit eval`, also `python eval.py`: accuracy and speed of a checkpoint on labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from hvit_jax.commands.flags import as_main, parse, value_of
from hvit_jax.distributed.together import run_together
from hvit_jax.evaluation import EvalConfig, evaluate
from hvit_jax.evaluation.results import read_results
from hvit_jax.evaluation.verify import print_verification, repeated
from hvit_jax.system.progress import plain_console

PROGRAM = "hvit eval"
_DESCRIPTION = """Measure accuracy and speed of a checkpoint on labelled pictures, dense or under a
token reduction method. With neither DATA nor --checkpoint the bundled demo runs."""
DIFFERS = 1  # Exit status.


def _main(words: Sequence[str]) -> int | None:
    recorded = base = None
    if (path := value_of("--verify", words, PROGRAM)) is not None:
        # Before the evaluation, whose --output may replace the file.
        recorded = read_results(Path(path))
        base = repeated(Path(path), recorded)
    config = parse(EvalConfig, words, PROGRAM, _DESCRIPTION, base=base)
    return run_together(lambda: _evaluate(config, recorded), config.processes, PROGRAM)


def _evaluate(config: EvalConfig, recorded: dict[str, Any] | None) -> int:
    results = evaluate(config)
    if recorded is None or jax.process_index():
        return 0
    return 0 if print_verification(plain_console(), recorded, results) else DIFFERS


main = as_main(_main, PROGRAM)
