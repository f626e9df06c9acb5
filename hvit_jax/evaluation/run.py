"""One evaluation from beginning to end."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from rich.console import Console

from hvit_jax.config import Compute
from hvit_jax.data.loader import Batch
from hvit_jax.data.picture import PictureError
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.inputs import Inputs, open_inputs
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.probing import Training
from hvit_jax.evaluation.results import (
    describe,
    describe_model,
    print_results,
    running_scores,
    scores,
    write_predictions,
)
from hvit_jax.evaluation.resume import INTERVAL, TRAINING, ProgressFolder
from hvit_jax.evaluation.step import Scoring, Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import as_json
from hvit_jax.models.vit import ViT
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.reducers import warn_without_budgets
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, show_progress
from hvit_jax.system.provenance import FINGERPRINTS, describe_runtime
from hvit_jax.system.signals import sigterm_raises, uninterrupted, unmasked

# Results of processes are added up, so these must be the same in all of them.
_SAME_EVERYWHERE = ("args", "versions", "matmul_precision", "preprocessing", *FINGERPRINTS)


@dataclass(frozen=True)
class Seams:
    """Where tests take hold of an evaluation."""

    compile: Callable[[ViT, int, Placement, Scoring], Step] = compile_step
    # Called with "opened", "begun", "compiled", "batch" (after each one), "scored" and "written",
    # with a probe before also "learning" (after each batch and step) and "learnt"; what it raises
    # stops the evaluation.
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
    with sigterm_raises() as check_stop, progress:
        data, checkpoint = config.inputs
        inputs = open_inputs(
            data,
            checkpoint,
            config.resolution,
            config.reducer,
            messages.print,
            preparing=config.preparing,
            labelling=config.labelling,
            classifying=config.classifying,
        )
        work = _Work.of(inputs, config.compute, config.batch_size, skip=config.on_error == "skip")
        warn_if_slow(config.compute.dtype, messages.print)
        seams.on_stage("opened")
        about = {**work.about, "config": as_json(config)}
        tally = Tally(keep_logits=config.predictions is not None)
        training = None if inputs.training is None else Tally(keep_logits=True)
        finished = _begin(work, about, tally, training, progress)
        if finished is not None:
            if first:
                print_results(console, finished)
            return finished
        seams.on_stage("begun")

        def reached(stage: str) -> None:
            if training is not None and stage == "learning":
                progress.save_if_due(training, TRAINING)
            else:
                progress.save_if_due(tally)
            seams.on_stage(stage)
            check_stop()

        if training is not None:
            work, about["probe"] = _learn(work, config, training, progress, messages, reached)
        source, start = inputs.source, gather(tally.totals.pictures)[0]
        sharding = BatchSharding(len(source), work.batch_size, first=start)
        size, labels = inputs.sizes.image_shape, inputs.labelled.right[list(sharding.indices)]
        # The workers start to decode while the model compiles.
        with sharding.load(source, size, config.workers, inputs.preprocessing) as batches:
            stop, seconds = _score(work, batches, labels, tally, messages, seams.compile, reached)
            about |= {"compile_seconds": seconds, "partial": stop is not None}
            results = {**about, **scores(tally)}
            # An error before the first picture leaves nothing to write.
            if first and (results["images"] or not isinstance(stop, InputError)):
                paths, names = source.paths, inputs.labelled.names
                progress.conclude(
                    results,
                    tally,
                    len(source),
                    done="scored",
                    show=print_results,
                    console=console,
                    on_stage=seams.on_stage,
                    write_predictions=lambda path: write_predictions(path, tally, paths, names),
                )
    if stop is not None:
        raise stop
    return results


@dataclass(frozen=True)
class _Work:
    """What is scored, by which model, on which devices, in which batches."""

    inputs: Inputs
    model: ViT
    placement: Placement
    batch_size: int
    skip_unreadable: bool
    scoring: Scoring

    @classmethod
    def of(cls, inputs: Inputs, compute: Compute, batch_size: int, *, skip: bool) -> _Work:
        """Read the weights; the batch is no larger than the data, and a multiple of the devices."""
        placement = place()
        size = placement.round_up(min(batch_size, len(inputs.source)))
        return cls(inputs, inputs.model(compute), placement, size, skip, inputs.scoring)

    @property
    def text(self) -> str:
        """Say in one line what is scored, and by what."""
        labelled = self.inputs.labelled
        classes = len(labelled.source.classes or labelled.names)
        return f"{len(labelled.source)} pictures, {classes} classes; {describe(self.about)}"

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What results follow from, in the form that they have."""
        return {
            **describe_model(self.model),
            **describe_runtime(self.placement.devices),
            "processes": self.placement.processes,
            "batch_size": self.batch_size,
            **self.inputs.describe(),
        }


def _begin(
    work: _Work,
    about: dict[str, Any],
    tally: Tally,
    training: Tally | None,
    progress: ProgressFolder,
) -> dict[str, Any] | None:
    """Check that all processes do the same, and put into the tallies what was done before.

    Returns:
        The results if all is done already.

    Raises:
        InputError: if processes or an earlier run differ; `PictureError` if an earlier run has left
            out pictures, which this one may not.
    """
    same: dict[str, Any] = {name: about.get(name) for name in _SAME_EVERYWHERE}
    same |= {name: about["config"][name] for name in ("compute", "on_error", "classifying")}
    check_same(f"batches of {work.batch_size}; {work.text}", **same)
    count = len(work.inputs.source)
    finished = gather(progress.begin(about, tally, count, training))[0]
    skipped = tally.skipped + (training.skipped if training is not None else [])
    if finished is not None:
        skipped = finished["skipped"] + finished.get("probe", {}).get("skipped", [])
    if skipped and not work.skip_unreadable:
        raise PictureError(f"{skipped[0]}; --on-error skip leaves it out")
    return finished


def _learn(
    work: _Work,
    config: EvalConfig,
    tally: Tally,
    progress: ProgressFolder,
    messages: Console,
    reached: Callable[[str], None],
) -> tuple[_Work, dict[str, Any]]:
    """Train the probe; give the work with its head, and how it came about.

    Whatever ends this, the features so far are saved.
    """
    training = Training(
        work.inputs,
        work.model,
        work.placement,
        config.batch_size,
        config.workers,
        messages,
        skip_unreadable=work.skip_unreadable,
        on_step=lambda: reached("learning"),
    )
    try:
        with unmasked():
            head, about = training.learn(tally)
    except PictureError as error:
        raise PictureError(f"{error}; --on-error skip leaves such pictures out") from error
    except KeyboardInterrupt:
        more = "; --resume continues" if config.output else ""
        messages.print(f"interrupted: {tally.totals.pictures} training pictures were seen{more}")
        raise
    finally:
        with uninterrupted():
            progress.save(tally, TRAINING)
    tally.rows.clear()  # Gigabytes, which the head is made of now.
    reached("learnt")
    return dataclasses.replace(work, scoring=dataclasses.replace(work.scoring, head=head)), about


def _score(
    work: _Work,
    batches: Iterator[Batch],
    labels: Int[np.ndarray, "N ..."],
    tally: Tally,
    messages: Console,
    compile: Callable[[ViT, int, Placement, Scoring], Step],
    reached: Callable[[str], None],
) -> tuple[BaseException | None, float | None]:
    """Compile, and score all batches; give what has stopped that, and the seconds of compiling."""
    placement, size, count = work.placement, work.batch_size, len(work.inputs.source)
    model, seconds = work.model, None
    try:
        messages.print(work.text)
        warn_without_budgets(model.reducer, model.config, messages.print)
        with unmasked(), explain_out_of_memory(size, smaller_batch(size, placement.devices)):
            started = time.perf_counter()
            step = compile(model, size, placement, work.scoring)
            seconds = time.perf_counter() - started
            messages.print(f"compiled in {seconds:.1f} s")
            reached("compiled")
            with show_progress(messages, count, tally.totals.pictures, unit="pictures") as show:

                def on_batch(tally: Tally) -> None:
                    show(tally.totals.pictures, running_scores(tally))
                    reached("batch")

                put, skip = placement.shard_batch, work.skip_unreadable
                score(step, batches, labels, tally, put, skip_unreadable=skip, on_batch=on_batch)
        reached("scored")
    except PictureError as error:
        return PictureError(f"{error}; --on-error skip leaves such pictures out"), seconds
    except (KeyboardInterrupt, InputError) as error:
        return error, seconds
    return None, seconds
