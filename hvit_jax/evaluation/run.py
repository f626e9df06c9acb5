"""One evaluation: everything put together, and what it leaves behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console

from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.distributed import check_agreement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.options import Options
from hvit_jax.evaluation.progress import show_progress
from hvit_jax.evaluation.report import describe, print_report
from hvit_jax.evaluation.results import describe_model, save_predictions, save_results, scores
from hvit_jax.evaluation.score import score
from hvit_jax.evaluation.shares import Shares, share_out
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.evaluation.verify import report_verification
from hvit_jax.models.vit import ViT
from hvit_jax.parallel import Placement, place
from hvit_jax.peers import NoPeers, Peers
from hvit_jax.provenance import fingerprints, names_crc32
from hvit_jax.signals import exit_status, sigterm_raises


def evaluate(
    options: Options, inputs: Inputs, model: ViT, messages: Console, peers: Peers | NoPeers
) -> int:
    """Score a source's pictures, print the results and write what the command line asks for.

    Args:
        options: the command line.
        inputs: data and checkpoint.
        model: the model.
        messages: where progress goes.
        peers: the other processes; the one with index 0 prints and writes.

    Returns:
        The exit status: 0, or what shells expect after a signal.

    Raises:
        InputError: if a picture cannot be read, a result not be written, or processes disagree.
    """
    placement, tally = place(), Tally(keep_logits=options.predictions is not None)
    count, stop = len(inputs.source), None
    shares = share_out(count, placement.round_up(min(options.batch_size, count)))
    about = _describe(inputs, model, placement, shares)

    def finish(*, partial: bool) -> None:
        if peers.index == 0:
            _finish(options, inputs, model, tally, {**about, "partial": partial})

    # The workers start to decode while the model compiles.
    with sigterm_raises(), _load(options, inputs, model, shares) as batches:
        try:
            peers.saves(lambda: finish(partial=True))
            messages.print(_counts(inputs) + describe(about))
            started = time.perf_counter()
            step = compile_step(model, shares.batch_size, placement)
            about["compile_seconds"] = time.perf_counter() - started
            messages.print(f"compiled in {about['compile_seconds']:.1f} s")
            with show_progress(messages, count) as on_batch:
                score(
                    step,
                    batches,
                    [inputs.labels[index] for index in shares.indices],
                    tally,
                    put=placement.divide,
                    shares=shares if shares.processes > 1 else None,
                    skip_unreadable=options.on_error == "skip",
                    on_batch=on_batch,
                )
        except PictureError as error:
            stop = PictureError(f"{error}; --on-error skip leaves such pictures out")
        except (KeyboardInterrupt, InputError) as error:
            stop = error
        with peers.ending:
            peers.done()
            # A picture that cannot be read loses nothing of what was scored before it either.
            if tally.totals.images or not isinstance(stop, InputError):
                finish(partial=stop is not None)
    if isinstance(stop, InputError):
        raise stop
    if stop is not None:
        return exit_status(stop)
    if options.recorded is None or peers.index:
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return report_verification(console, options.recorded, {**about, **scores(tally)})


def _load(
    options: Options, inputs: Inputs, model: ViT, shares: Shares
) -> AbstractContextManager[Iterator[Batch]]:
    return load_batches(
        shares.take(inputs.source),
        model.config.image_shape,
        batch_size=shares.rows,
        workers=options.workers,
        batches=shares.batches,
    )


def _counts(inputs: Inputs) -> str:
    return f"{len(inputs.source)} pictures, {len(inputs.source.classes)} classes; "


def _describe(inputs: Inputs, model: ViT, placement: Placement, shares: Shares) -> dict[str, Any]:
    """Describe the run, and check that all processes mean the same one.

    Raises:
        InputError: if they do not, since their programs would wait for each other.
    """
    about = {
        **describe_model(model),
        "devices": placement.devices,
        "processes": placement.processes,
        "batch_size": shares.batch_size,
        "data": inputs.data,
        "checkpoint": inputs.checkpoint,
        "checkpoint_source": inputs.description.source,
        **fingerprints(inputs.source, inputs.checkpoint),
        "compile_seconds": None,
    }
    names = names_crc32(inputs.source)
    check_agreement(f"{_counts(inputs)}batches of {shares.batch_size}; {describe(about)}", names)
    return about


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
