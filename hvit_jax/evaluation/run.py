"""One evaluation from beginning to end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from hvit_jax.checkpoint import describe_checkpoint, fitted_parameters
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.picture import PictureError
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.inputs import open_inputs
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.results import (
    describe,
    describe_model,
    print_results,
    running_scores,
    scores,
)
from hvit_jax.evaluation.resume import INTERVAL, ProgressFolder
from hvit_jax.evaluation.step import Scoring, Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model
from hvit_jax.models.vit import ViT
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.reducers import warn_without_budgets
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, show_progress
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.system.signals import sigterm_raises, uninterrupted

# Results of processes are added up, so these must be the same in all of them.
_SAME_EVERYWHERE = ("args", "versions", "matmul_precision", "data_sha256", "checkpoint_sha256")
_SAME_EVERYWHERE += ("labels_sha256", "preprocessing")


@dataclass(frozen=True)
class Seams:
    """Where tests take hold of an evaluation."""

    compile: Callable[[ViT, int, Placement, Scoring], Step] = compile_step
    # Called with "opened", "begun", "compiled", "batch" (after each one), "scored" and "written";
    # what it raises stops the evaluation.
    on_stage: Callable[[str], None] = lambda stage: None
    interval: float = INTERVAL  # Seconds between two savings.


def evaluate(
    config: EvalConfig,
    *,
    console: Console | None = None,
    messages: Console | None = None,
    seams: Seams = Seams(),
) -> dict[str, Any]:
    """Score pictures, print the results and write what the record asks for.

    In a program of several processes all of them call this, and the first one prints and writes;
    `jax.distributed.initialize` or `run_together` has been called before.

    Args:
        config: what to evaluate, and how.
        console: where the results are printed; default: stdout.
        messages: where progress goes; default: stderr.
        seams: for tests.

    Returns:
        The results, as --output writes them: scores, configuration, device, versions, and
        fingerprints of data and checkpoint. With `resume`, those of an earlier run if it has
        written all of them.

    Raises:
        InputError: if an option, data or checkpoint is wrong, a picture cannot be read, a result
            not be written, or memory runs out; what was scored before is written all the same.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM; what was scored before is
            written.
    """
    use_compilation_cache(config.cache)
    first = jax.process_index() == 0
    console = console or Console(highlight=False, markup=False)
    messages = messages or plain_console(stderr=True, quiet=not first)
    progress = ProgressFolder(
        config.output if first else None,
        config.predictions if first else None,
        say=messages.print,
        resume=config.resume,
        overwrite=config.overwrite,
        interval=seams.interval,
    )
    with contextlib.ExitStack() as stack:
        check_stop = stack.enter_context(sigterm_raises())
        stack.enter_context(progress)
        data, checkpoint = config.inputs
        labelled, sizes, preprocessing = open_inputs(
            data,
            checkpoint,
            config.resolution,
            messages.print,
            config.reducer,
            preparing=config.preparing,
            labelling=config.labelling,
        )
        source = labelled.source
        scoring = Scoring(preprocessing, labelled.outputs, labelled.right.shape[1:])
        warn_if_slow(config.compute.dtype, messages.print)
        parameters = fitted_parameters(checkpoint, sizes)
        model = build_model(sizes, config.reducer, parameters, config.compute)
        seams.on_stage("opened")

        placement, count = place(), len(source)
        size = placement.round_up(min(config.batch_size, count))
        about = {
            **describe_model(model),
            **describe_runtime(placement.devices),
            "processes": placement.processes,
            "batch_size": size,
            "data": data,
            "data_sha256": data_sha256(source),
            **labelled.describe(),
            "preprocessing": as_json(preprocessing),
            "checkpoint": str(checkpoint),
            **describe_checkpoint(checkpoint),
            "compile_seconds": None,
            "config": as_json(config),
        }
        classes = len(source.classes or labelled.names)
        text = f"{count} pictures, {classes} classes; {describe(about)}"
        same = {name: about[name] for name in _SAME_EVERYWHERE}
        same |= {name: about["config"][name] for name in ("compute", "on_error")}
        check_same(f"batches of {size}; {text}", **same)

        tally = Tally(keep_logits=config.predictions is not None)
        written_before = gather(progress.begin(about, tally, count))[0]
        skipped = (written_before or {}).get("skipped", tally.skipped)
        if skipped and config.on_error != "skip":
            raise PictureError(f"{skipped[0]}; --on-error skip leaves it out")
        if written_before:
            if first:
                print_results(console, written_before)
            return written_before
        start = gather(tally.totals.pictures)[0]
        sharding = BatchSharding(count, size, first=start)
        seams.on_stage("begun")

        # The workers start to decode while the model compiles.
        batches = stack.enter_context(
            sharding.load(source, sizes.image_shape, config.workers, preprocessing)
        )
        stop = None
        try:
            messages.print(text)
            warn_without_budgets(model.reducer, sizes, messages.print)
            with explain_out_of_memory(size, smaller_batch(size, placement.devices)):
                started = time.perf_counter()
                step = seams.compile(model, size, placement, scoring)
                about["compile_seconds"] = time.perf_counter() - started
                messages.print(f"compiled in {about['compile_seconds']:.1f} s")
                seams.on_stage("compiled")
                with show_progress(messages, count, start, unit="pictures") as show:

                    def on_batch(tally: Tally) -> None:
                        show(tally.totals.pictures, running_scores(tally))
                        progress.save_if_due(tally)
                        seams.on_stage("batch")
                        check_stop()

                    score(
                        step,
                        batches,
                        labelled.right,
                        tally,
                        sharding,
                        placement.shard_batch,
                        skip_unreadable=config.on_error == "skip",
                        on_batch=on_batch,
                    )
            seams.on_stage("scored")
        except PictureError as error:
            stop = PictureError(f"{error}; --on-error skip leaves such pictures out")
        except (KeyboardInterrupt, InputError) as error:
            stop = error

        results = {**about, "partial": stop is not None, **scores(tally)}
        # An error before the first picture leaves nothing to write.
        if first and (results["images"] or not isinstance(stop, InputError)):
            with uninterrupted():  # A signal that comes now finds all written and printed.
                written, problems = progress.write(results, tally, source.paths, labelled.names)
                seams.on_stage("written")
                if stop is not None or problems:
                    progress.save(tally)
                else:
                    progress.remove()
                # Only now: where printing fails, for want of a reader or of space, all is done.
                print_results(console, results)
                if stop is not None:
                    more = "; --resume continues" if config.output else ""
                    scored = f"{results['images']} of {count} pictures were scored"
                    console.print(f"interrupted: {scored}{more}")
                for path in written:
                    console.print(f"written: {path}", soft_wrap=True)
            if problems:
                raise InputError("; ".join(problems))
            if stop is None and not results["images"]:
                raise InputError(f"none of the {count} pictures could be read")
    if stop is not None:
        raise stop
    return results
