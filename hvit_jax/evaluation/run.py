"""One evaluation: everything put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from hvit_jax.data.fingerprint import fingerprints
from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.subset import Subset
from hvit_jax.distributed.peers import NoPeers, Peers
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.distributed.together import check_agreement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.keeping import Keeper
from hvit_jax.evaluation.options import Options
from hvit_jax.evaluation.outcome import report, write_files
from hvit_jax.evaluation.progress import show_progress
from hvit_jax.evaluation.report import describe
from hvit_jax.evaluation.results import describe_model, scores
from hvit_jax.evaluation.score import score
from hvit_jax.evaluation.shares import Shares, share_out
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.evaluation.verify import report_verification
from hvit_jax.models.vit import ViT
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.signals import exit_status, sigterm_raises

Stop = KeyboardInterrupt | InputError
# Results of processes are added up, so these must be the same in all of them.
_SAME_EVERYWHERE = ("data_sha256", "checkpoint_sha256", "versions", "matmul_precision")
_SAME_EVERYWHERE += ("args", "attention", "unroll", "on_error")


@dataclass(frozen=True)
class Run:
    """What an evaluation consists of.

    Attributes:
        options: the command line.
        inputs: data and checkpoint.
        model: the model.
        messages: where progress goes.
        peers: the other processes; the one with index 0 prints and writes.
        placement: the devices.
        shares: how processes share the pictures that are left to score.
        tally: what has been scored, by an earlier run too.
        keeper: keeps that on disk.
        about: what the results say besides the scores.
    """

    options: Options
    inputs: Inputs
    model: ViT
    messages: Console
    peers: Peers | NoPeers
    placement: Placement
    shares: Shares
    tally: Tally
    keeper: Keeper
    about: dict[str, Any]


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
        InputError: if a picture cannot be read, a result not be written, memory runs out, processes
            disagree, or there is an evaluation to go on with, but of something else.
    """
    run = _begin(options, inputs, model, messages, peers)
    # The workers start to decode while the model compiles.
    with sigterm_raises() as check_stop, _load(run) as batches:
        stop = _score(run, batches, check_stop)
        with peers.ending:
            peers.done()
            _finish(run, stop)
    if isinstance(stop, InputError):
        raise stop
    if stop is not None:
        return exit_status(stop)
    if options.recorded is None or peers.index:
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return report_verification(console, options.recorded, {**run.about, **scores(run.tally)})


def _begin(
    options: Options, inputs: Inputs, model: ViT, messages: Console, peers: Peers | NoPeers
) -> Run:
    """Find out what is left to do, and let all processes agree on it."""
    placement, tally = place(), Tally(keep_logits=options.predictions is not None)
    count = len(inputs.source)
    size = placement.round_up(min(options.batch_size, count))
    about = _describe(options, inputs, model, placement, size)
    keeper = Keeper(options, about, peers, messages)
    keeper.begin(tally, count)
    shares = share_out(count - tally.first, size)
    return Run(options, inputs, model, messages, peers, placement, shares, tally, keeper, about)


def _describe(
    options: Options, inputs: Inputs, model: ViT, placement: Placement, size: int
) -> dict[str, Any]:
    """Describe the run, and check that all processes mean the same one.

    Raises:
        InputError: if they do not, since their programs would wait for each other.
    """
    about = {
        **describe_model(model),
        **{name: getattr(options, name) for name in ("attention", "unroll", "on_error")},
        "devices": placement.devices,
        "processes": placement.processes,
        "batch_size": size,
        "data": inputs.data,
        "checkpoint": inputs.checkpoint,
        "checkpoint_source": inputs.description.source,
        **fingerprints(inputs.source, inputs.checkpoint),
        "compile_seconds": None,
    }
    same = {name: about[name] for name in _SAME_EVERYWHERE}
    check_agreement(f"{_counts(inputs)}batches of {size}; {describe(about)}", **same)
    return about


def _counts(inputs: Inputs) -> str:
    return f"{len(inputs.source)} pictures, {len(inputs.source.classes)} classes; "


def _load(run: Run) -> AbstractContextManager[Iterator[Batch]]:
    source, first = run.inputs.source, run.tally.first
    left = Subset(source, tuple(range(first, len(source)))) if first else source
    return load_batches(
        run.shares.take(left),
        run.model.config.image_shape,
        batch_size=run.shares.rows,
        workers=run.options.workers,
        batches=run.shares.batches,
    )


def _score(run: Run, batches: Iterator[Batch], check_stop: Callable[[], None]) -> Stop | None:
    """Score what is left; returns what stopped it before the end, if anything did."""
    size = run.shares.batch_size
    try:
        run.peers.saves(lambda: _leave(run, partial=True))
        run.messages.print(_counts(run.inputs) + describe(run.about))
        with explain_out_of_memory(size, smaller_batch(size, run.placement.devices)):
            _compile_and_score(run, batches, check_stop)
    except PictureError as error:
        return PictureError(f"{error}; --on-error skip leaves such pictures out")
    except (KeyboardInterrupt, InputError) as error:
        return error
    return None


def _compile_and_score(run: Run, batches: Iterator[Batch], check_stop: Callable[[], None]) -> None:
    shares, first = run.shares, run.tally.first
    started = time.perf_counter()
    step = compile_step(run.model, shares.batch_size, run.placement)
    run.about["compile_seconds"] = time.perf_counter() - started
    run.messages.print(f"compiled in {run.about['compile_seconds']:.1f} s")
    with show_progress(run.messages, len(run.inputs.source), first) as show:

        def on_batch(tally: Tally) -> None:
            show(tally)
            with run.peers.ending:
                run.keeper.keep(tally)
            check_stop()

        score(
            step,
            batches,
            [run.inputs.labels[first + index] for index in shares.indices],
            run.tally,
            put=run.placement.divide,
            shares=shares if shares.processes > 1 else None,
            skip_unreadable=run.options.on_error == "skip",
            on_batch=on_batch,
        )


def _finish(run: Run, stop: Stop | None) -> None:
    # Whatever stopped it loses nothing of what was scored before either.
    if run.tally.totals.images or not isinstance(stop, InputError):
        _leave(run, partial=stop is not None)
    else:
        run.keeper.leave_nothing()


def _leave(run: Run, *, partial: bool) -> None:
    """Print and write what there is, if this process does that for all."""
    if run.peers.index:
        return
    results = {**run.about, "partial": partial, **scores(run.tally)}
    written, problems = write_files(run.options, run.inputs, run.tally, results)
    if partial or problems:
        run.keeper.save(run.tally)
        run.keeper.leave_nothing()
    else:
        run.keeper.finish()
    # Only now: where printing fails, for want of a reader or of space, all else is done.
    report(run.options, results, len(run.inputs.source), written)
    if problems:
        raise InputError("; ".join(problems))
    if not partial and not run.tally.totals.images:
        raise InputError(f"none of the {len(run.inputs.source)} pictures could be read")
