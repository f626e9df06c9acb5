"""What an evaluation leaves behind: the files that the command line asks for, and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.options import Options
from hvit_jax.evaluation.report import print_report
from hvit_jax.evaluation.results import save_predictions, save_results
from hvit_jax.evaluation.tally import Tally


def write_files(
    options: Options, inputs: Inputs, tally: Tally, results: dict[str, Any]
) -> tuple[list[Path], list[str]]:
    """Write --predictions and --output, in this order: the results are the sign that all is done.

    Args:
        options: the command line.
        inputs: data and checkpoint.
        tally: what has been scored.
        results: what --output is to hold.

    Returns:
        The files that were written, and what is wrong with the others.
    """
    written, problems = [], []
    for path, save in (
        (options.predictions, lambda path: save_predictions(path, tally, inputs)),
        (options.output, lambda path: save_results(path, results)),
    ):
        if path is not None:
            try:
                save(path)
                written.append(path)
            except InputError as error:
                problems.append(str(error))
    return written, problems


def report(options: Options, results: dict[str, Any], total: int, written: Sequence[Path]) -> None:
    """Print the results.

    Args:
        options: the command line.
        results: of the evaluation.
        total: pictures in all.
        written: files to mention.
    """
    console = Console(highlight=False, markup=False)
    print_report(console, results)
    if results["partial"]:
        more = "; --resume goes on" if options.output else ""
        console.print(f"interrupted: {results['images']} of {total} pictures were scored{more}")
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)
