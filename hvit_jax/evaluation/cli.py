"""`python eval.py` and `hvit-eval`: accuracy and speed of a checkpoint on labelled pictures."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from hvit_jax.api import load, with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.command_line import run
from hvit_jax.data.loader import load_batches
from hvit_jax.errors import InputError
from hvit_jax.evaluation.files import check_destination
from hvit_jax.evaluation.inputs import Inputs, data_or_demo, open_inputs
from hvit_jax.evaluation.interrupt import exit_status, sigterm_raises
from hvit_jax.evaluation.options import PROGRAM, Options, parse_options
from hvit_jax.evaluation.progress import show_progress
from hvit_jax.evaluation.report import describe, print_report
from hvit_jax.evaluation.results import describe_model, save_predictions, save_results, scores
from hvit_jax.evaluation.score import score
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.models.vit import ViT
from hvit_jax.parallel import place


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `hvit-eval --help`.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 2 after a user's mistake; 130 or 143 where Ctrl-C or SIGTERM ended it early.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    for path in (options.output, options.predictions):
        if path is not None:
            check_destination(path, overwrite=options.overwrite)
    data, checkpoint = data_or_demo(options.data, options.checkpoint)
    config = read_description(checkpoint).config
    options.reducer.resolve(with_resolution(config, options.resolution))
    inputs = open_inputs(data, checkpoint)
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if inputs.note is not None:
        messages.print(inputs.note)
    model = load(
        inputs.checkpoint,
        options.reducer,
        resolution=options.resolution,
        dtype=options.dtype,
        attention=options.attention,
        unroll=options.unroll,
    )
    return _evaluate(options, inputs, model, messages)


def _evaluate(options: Options, inputs: Inputs, model: ViT, messages: Console) -> int:
    source, tally = inputs.source, Tally(keep_logits=options.predictions is not None)
    placement = place()
    batch_size = placement.round_up(min(options.batch_size, len(source)))
    about = {
        **describe_model(model),
        "devices": placement.devices,
        "processes": placement.processes,
        "batch_size": batch_size,
        "data": inputs.data,
        "checkpoint": inputs.checkpoint,
        "checkpoint_source": inputs.description.source,
        "compile_seconds": None,
    }
    counts = f"{len(source)} pictures, {len(source.classes)} classes"
    stop, shape = None, model.config.image_shape
    # The workers start to decode while the model compiles.
    with (
        sigterm_raises(),
        load_batches(source, shape, batch_size=batch_size, workers=options.workers) as batches,
    ):
        try:
            messages.print(f"{counts}; {describe(about)}")
            started = time.perf_counter()
            step = compile_step(model, batch_size, placement)
            about["compile_seconds"] = time.perf_counter() - started
            messages.print(f"compiled in {about['compile_seconds']:.1f} s")
            skip = options.on_error == "skip"
            with show_progress(messages, len(source)) as on_batch:
                score(
                    step,
                    batches,
                    inputs.labels,
                    tally,
                    put=placement.divide,
                    skip_unreadable=skip,
                    on_batch=on_batch,
                )
        except (KeyboardInterrupt, InputError) as error:
            stop = error
        # A picture that cannot be read loses nothing of what was scored before it either.
        if tally.totals.images or not isinstance(stop, InputError):
            _finish(options, inputs, model, tally, {**about, "partial": stop is not None})
    if isinstance(stop, InputError):
        raise stop
    return 0 if stop is None else exit_status(stop)


def _finish(
    options: Options, inputs: Inputs, model: ViT, tally: Tally, about: dict[str, Any]
) -> None:
    """Print the results first, so that a full disk cannot hide them; then write them."""
    results = {**about, **scores(tally)}
    console, total = Console(highlight=False, markup=False), len(inputs.source)
    print_report(console, results)
    if results["partial"]:
        console.print(f"interrupted: {results['images']} of {total} pictures were scored")
    problems = []
    for path, save in (
        (options.output, lambda path: save_results(path, results)),
        (
            options.predictions,
            lambda path: save_predictions(
                path, tally, inputs.source.paths, model.config.num_classes
            ),
        ),
    ):
        if path is not None:
            try:
                save(path)
                console.print(f"written: {path}", soft_wrap=True)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
    if not results["images"] and not results["partial"]:
        raise InputError(f"none of the {total} pictures could be read")
