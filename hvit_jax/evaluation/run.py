"""One evaluation: everything put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console

from hvit_jax.api import load, with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.data.fingerprint import fingerprints
from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch
from hvit_jax.data.source import Subset
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.inputs import Inputs, open_inputs, or_demo
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.results import (
    describe,
    describe_model,
    print_results,
    scores,
    show_progress,
    write_files,
)
from hvit_jax.evaluation.resume import INTERVAL, ProgressFolder
from hvit_jax.evaluation.step import Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import as_json
from hvit_jax.models.vit import ViT
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.signals import sigterm_raises

# What scored pictures depend on, so that --resume needs the same; batch and devices may change.
_RESULTS_DEPEND_ON = ("method", "args", "model", "device", "matmul_precision", "versions")
_RESULTS_DEPEND_ON += ("data_sha256", "checkpoint_sha256")
# Results of processes are added up, so these must be the same in all of them.
_SAME_EVERYWHERE = ("args", "versions", "matmul_precision", "data_sha256", "checkpoint_sha256")


@dataclass(frozen=True)
class Seams:
    """What stands between an evaluation and the world; tests replace it.

    Attributes:
        compile: makes the step of a model.
        on_stage: called with "opened", "begun", "compiled", "batch" (after each one), "scored" and
            "written"; what it raises stops the evaluation.
        interval: seconds between two savings.
    """

    compile: Callable[[ViT, int, Placement], Step] = compile_step
    on_stage: Callable[[str], None] = lambda stage: None
    interval: float = INTERVAL


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
        fingerprints of data and checkpoint.

    Raises:
        InputError: if an option, data or checkpoint is wrong, a picture cannot be read, a result
            not be written, or memory runs out; what was scored before is written all the same.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM; what was scored before is
            written.
    """
    first = jax.process_index() == 0
    console = console or Console(highlight=False, markup=False, quiet=not first)
    messages = messages or Console(
        stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not first
    )
    folder = ProgressFolder(config, messages, active=first, interval=seams.interval)
    with sigterm_raises() as check_stop, folder as progress:
        evaluation = _begin(config, console, messages, progress, seams)
        # The workers start to decode while the model compiles.
        with evaluation.load() as batches:
            stop = evaluation.score(batches, check_stop)
            results = evaluation.finish(stop)
    if stop is not None:
        raise stop
    return results


def _begin(
    config: EvalConfig,
    console: Console,
    messages: Console,
    progress: ProgressFolder,
    seams: Seams,
) -> Evaluation:
    """Open everything, find out what is left to do, and let all processes agree on it."""
    _, checkpoint = or_demo(config.data, config.checkpoint)
    # Wrong options are found before thousands of pictures are listed.
    config.reducer.resolve(with_resolution(read_description(checkpoint).config, config.resolution))
    inputs = open_inputs(config.data, config.checkpoint)
    if inputs.note is not None:
        messages.print(inputs.note)
    model = load(
        inputs.checkpoint,
        config.reducer,
        resolution=config.resolution,
        dtype=config.compute.dtype,
        param_dtype=config.compute.param_dtype,
        attention=config.compute.attention,
        unroll=config.compute.unroll,
    )
    seams.on_stage("opened")
    placement, tally = place(), Tally(keep_logits=config.predictions is not None)
    count = len(inputs.source)
    size = placement.round_up(min(config.batch_size, count))
    about = _describe(config, inputs, model, placement, size)
    progress.begin(_settings(config, model, about), tally, count)
    tally.first = gather(tally.first)[0]
    seams.on_stage("begun")
    return Evaluation(
        config=config,
        inputs=inputs,
        model=model,
        placement=placement,
        sharding=BatchSharding(count - tally.first, size),
        tally=tally,
        progress=progress,
        about=about,
        console=console,
        messages=messages,
        seams=seams,
    )


def _describe(
    config: EvalConfig, inputs: Inputs, model: ViT, placement: Placement, size: int
) -> dict[str, Any]:
    """Describe the evaluation, and check that all processes mean the same one.

    Raises:
        InputError: if they do not, since their programs would wait for each other.
    """
    about = {
        **describe_model(model, placement.devices),
        "processes": placement.processes,
        "batch_size": size,
        "data": inputs.data,
        "checkpoint": str(inputs.checkpoint),
        "checkpoint_source": inputs.description.source,
        **fingerprints(inputs.source, inputs.checkpoint),
        "compile_seconds": None,
        "config": as_json(config),
    }
    same = {name: about[name] for name in _SAME_EVERYWHERE}
    same |= {name: about["config"][name] for name in ("compute", "on_error")}
    check_same(f"{_counts(inputs)}batches of {size}; {describe(about)}", **same)
    return about


def _settings(config: EvalConfig, model: ViT, about: dict[str, Any]) -> dict[str, Any]:
    """List what scored pictures depend on; DATA and --checkpoint say where it lies."""
    options = {
        "resolution": list(model.config.image_shape),
        **as_json(config.compute),
        "predictions": config.predictions and str(config.predictions),
        **{name: about[name] for name in ("data", "checkpoint")},
    }
    return {**{name: about[name] for name in _RESULTS_DEPEND_ON}, "options": options}


def _counts(inputs: Inputs) -> str:
    return f"{len(inputs.source)} pictures, {len(inputs.source.classes)} classes; "


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that has begun.

    Attributes:
        config: what to evaluate, and how.
        inputs: data and checkpoint.
        model: the model.
        placement: the devices.
        sharding: how the processes divide the pictures that are left to score.
        tally: what has been scored, by an earlier run too.
        progress: saves that on disk.
        about: what the results say besides the scores.
        console: where the results are printed.
        messages: where progress goes.
        seams: for tests.
    """

    config: EvalConfig
    inputs: Inputs
    model: ViT
    placement: Placement
    sharding: BatchSharding
    tally: Tally
    progress: ProgressFolder
    about: dict[str, Any]
    console: Console
    messages: Console
    seams: Seams

    def load(self):
        """Start to decode the pictures that are left."""
        source, first = self.inputs.source, self.tally.first
        left = Subset(source, tuple(range(first, len(source)))) if first else source
        return self.sharding.load(left, self.model.config.image_shape, self.config.workers)

    def score(
        self, batches: Iterator[Batch], check_stop: Callable[[], None]
    ) -> KeyboardInterrupt | InputError | None:
        """Score what is left; returns what stopped it before the end, if anything did."""
        size = self.sharding.batch_size
        try:
            self.messages.print(_counts(self.inputs) + describe(self.about))
            with explain_out_of_memory(size, smaller_batch(size, self.placement.devices)):
                self._compile_and_score(batches, check_stop)
            self.seams.on_stage("scored")
        except PictureError as error:
            return PictureError(f"{error}; --on-error skip leaves such pictures out")
        except (KeyboardInterrupt, InputError) as error:
            return error
        return None

    def _compile_and_score(self, batches: Iterator[Batch], check_stop: Callable[[], None]) -> None:
        started = time.perf_counter()
        step = self.seams.compile(self.model, self.sharding.batch_size, self.placement)
        self.about["compile_seconds"] = time.perf_counter() - started
        self.messages.print(f"compiled in {self.about['compile_seconds']:.1f} s")
        self.seams.on_stage("compiled")
        first, count = self.tally.first, len(self.inputs.source)
        with show_progress(self.messages, count, first) as show:

            def on_batch(tally: Tally) -> None:
                show(tally)
                self.progress.save_if_due(tally)
                self.seams.on_stage("batch")
                check_stop()

            score(
                step,
                batches,
                self.inputs.labels[first:],
                self.tally,
                put=self.placement.divide,
                sharding=self.sharding,
                skip_unreadable=self.config.on_error == "skip",
                on_batch=on_batch,
            )

    def finish(self, stop: KeyboardInterrupt | InputError | None) -> dict[str, Any]:
        """Print and write what there is, if the first process does that for all.

        Args:
            stop: what stopped the evaluation before its end; nothing that was scored is lost.

        Raises:
            InputError: if results cannot be written, or no picture could be read.
        """
        partial = stop is not None
        results = {**self.about, "partial": partial, **scores(self.tally)}
        if jax.process_index() or (isinstance(stop, InputError) and not results["images"]):
            return results
        written, problems = write_files(self.config, self.inputs, self.tally, results)
        self.seams.on_stage("written")
        if partial or problems:
            self.progress.save(self.tally)
            if written:
                self.progress.keep()
        else:
            self.progress.remove()
        # Only now: where printing fails, for want of a reader or of space, all else is done.
        self._print(results, written)
        if problems:
            raise InputError("; ".join(problems))
        if not partial and not results["images"]:
            raise InputError(f"none of the {len(self.inputs.source)} pictures could be read")
        return results

    def _print(self, results: dict[str, Any], written: list) -> None:
        print_results(self.console, results)
        if results["partial"]:
            more = "; --resume goes on" if self.config.output else ""
            done, count = results["images"], len(self.inputs.source)
            self.console.print(f"interrupted: {done} of {count} pictures were scored{more}")
        for path in written:
            self.console.print(f"written: {path}", soft_wrap=True)
