"""What an evaluation leaves behind: its report, and the files that the command line asks for."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.options import Options
from hvit_jax.evaluation.report import print_report
from hvit_jax.evaluation.results import save_predictions, save_results, scores
from hvit_jax.evaluation.tally import Tally


def write_outcome(options: Options, inputs: Inputs, tally: Tally, about: dict[str, Any]) -> None:
    """Print the results first, so that a full disk cannot hide them; then write them.

    Args:
        options: the command line.
        inputs: data and checkpoint.
        tally: what has been scored.
        about: what the results say besides the scores.

    Raises:
        InputError: if a file cannot be written.
    """
    results = {**about, **scores(tally)}
    console, total = Console(highlight=False, markup=False), len(inputs.source)
    print_report(console, results)
    if results["partial"]:
        more = "; --resume goes on" if options.output else ""
        console.print(f"interrupted: {results['images']} of {total} pictures were scored{more}")
    problems = []
    for path, save in (
        (options.output, lambda path: save_results(path, results)),
        (options.predictions, lambda path: save_predictions(path, tally, inputs)),
    ):
        if path is not None:
            try:
                save(path)
                console.print(f"written: {path}", soft_wrap=True)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
