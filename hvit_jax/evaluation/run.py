"""One evaluation: everything put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import describe_checkpoint, fitted_parameters, read_description
from hvit_jax.costs import count_flops
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.folder import PictureError
from hvit_jax.data.loader import Batch
from hvit_jax.data.source import Subset
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.inputs import open_inputs, or_demo
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.results import (
    describe,
    print_results,
    running_scores,
    scores,
    write_files,
)
from hvit_jax.evaluation.resume import INTERVAL, ProgressFolder
from hvit_jax.evaluation.step import Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model
from hvit_jax.models.vit import ViT
from hvit_jax.published import describe_configuration, find_published
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.progress import show_progress
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.system.signals import sigterm_raises

Stop = KeyboardInterrupt | InputError
# What scored pictures depend on, so that --resume needs the same; batch and devices may change.
_RESULTS_DEPEND_ON = ("method", "args", "model", "device", "matmul_precision", "versions")
_RESULTS_DEPEND_ON += ("data_sha256", "checkpoint_sha256")
# Results of processes are added up, so these must be the same in all of them.
_SAME_EVERYWHERE = ("args", "versions", "matmul_precision", "data_sha256", "checkpoint_sha256")


@dataclass(frozen=True)
class Seams:
    """Where tests take hold of an evaluation.

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
    console = console or Console(highlight=False, markup=False)
    messages = messages or Console(
        stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=not first
    )
    folder = ProgressFolder(config, messages, active=first, interval=seams.interval)
    with sigterm_raises() as check_stop, folder as progress:
        evaluation = _Evaluation(config, messages, progress, seams)
        # The workers start to decode while the model compiles.
        with evaluation.load() as batches:
            stop = evaluation.score(batches, check_stop)
            results = evaluation.results(partial=stop is not None)
            # An error before the first picture leaves nothing to write.
            if first and (results["images"] or not isinstance(stop, InputError)):
                evaluation.finish(results, console)
    if stop is not None:
        raise stop
    return results


class _Evaluation:
    """An evaluation that has begun."""

    def __init__(
        self, config: EvalConfig, messages: Console, progress: ProgressFolder, seams: Seams
    ):
        """Open everything, find out what is left to do, and let all processes agree on it."""
        self.config, self.messages, self.progress, self.seams = config, messages, progress, seams
        _, checkpoint = or_demo(config.data, config.checkpoint)
        sizes = with_resolution(read_description(checkpoint).config, config.resolution)
        # Wrong options are found before thousands of pictures are listed.
        config.reducer.resolve(sizes)
        self.inputs = open_inputs(config.data, config.checkpoint)
        if self.inputs.note is not None:
            messages.print(self.inputs.note)
        parameters = fitted_parameters(checkpoint, sizes)
        self.model = build_model(sizes, config.reducer, parameters, config.compute)
        seams.on_stage("opened")
        self.placement, count = place(), len(self.inputs.source)
        self.tally = Tally(keep_logits=config.predictions is not None)
        size = self.placement.round_up(min(config.batch_size, count))
        self.about = self._describe(size)
        progress.begin(self._settings(), self.tally, count)
        self.tally.first = gather(self.tally.first)[0]
        self.sharding = BatchSharding(count - self.tally.first, size)
        seams.on_stage("begun")

    def _describe(self, batch_size: int) -> dict[str, Any]:
        """Give what the results say besides the scores, after checking that all processes agree."""
        model, inputs = self.model, self.inputs
        about = {
            **describe_configuration(model.config, model.reducer),
            "dtype": model.dtype.name,
            "gflops": count_flops(model.config, model.reducer) / 1e9,
            "published": find_published(model.config, model.reducer),
            **describe_runtime(self.placement.devices),
            "processes": self.placement.processes,
            "batch_size": batch_size,
            "data": inputs.data,
            "data_sha256": data_sha256(inputs.source),
            "checkpoint": str(inputs.checkpoint),
            **describe_checkpoint(inputs.checkpoint),
            "compile_seconds": None,
            "config": as_json(self.config),
        }
        same = {name: about[name] for name in _SAME_EVERYWHERE}
        same |= {name: about["config"][name] for name in ("compute", "on_error")}
        check_same(f"{self._counts}batches of {batch_size}; {describe(about)}", **same)
        return about

    def _settings(self) -> dict[str, Any]:
        """List what scored pictures depend on; DATA and --checkpoint say where it lies."""
        predictions = self.config.predictions
        options = {
            "resolution": self.about["resolution"],
            **as_json(self.config.compute),
            "predictions": predictions and str(predictions),
            "data": self.about["data"],
            "checkpoint": self.about["checkpoint"],
        }
        return {**{name: self.about[name] for name in _RESULTS_DEPEND_ON}, "options": options}

    @property
    def _counts(self) -> str:
        return f"{len(self.inputs.source)} pictures, {len(self.inputs.source.classes)} classes; "

    def load(self) -> AbstractContextManager[Iterator[Batch]]:
        """Start to decode the pictures that are left."""
        source, first = self.inputs.source, self.tally.first
        left = Subset(source, tuple(range(first, len(source)))) if first else source
        return self.sharding.load(left, self.model.config.image_shape, self.config.workers)

    def score(self, batches: Iterator[Batch], check_stop: Callable[[], None]) -> Stop | None:
        """Score what is left; returns what stopped it before the end, if anything did."""
        size = self.sharding.batch_size
        try:
            self.messages.print(self._counts + describe(self.about))
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
        with show_progress(self.messages, count, first, unit="pictures") as show:

            def on_batch(tally: Tally) -> None:
                show(tally.totals.pictures, running_scores(tally))
                self.progress.save_if_due(tally)
                self.seams.on_stage("batch")
                check_stop()

            score(
                step,
                batches,
                self.inputs.labels[first:],
                self.tally,
                put=self.placement.shard_batch,
                sharding=self.sharding,
                skip_unreadable=self.config.on_error == "skip",
                on_batch=on_batch,
            )

    def results(self, *, partial: bool) -> dict[str, Any]:
        """Give the results so far, as --output writes them."""
        return {**self.about, "partial": partial, **scores(self.tally)}

    def finish(self, results: dict[str, Any], console: Console) -> None:
        """Write and print the results, in the first process, which does that for all."""
        written, problems = write_files(self.config, self.inputs, self.tally, results)
        self.seams.on_stage("written")
        if results["partial"] or problems:
            self.progress.save(self.tally)
            if written:
                self.progress.keep()
        else:
            self.progress.remove()
        # Only now: where printing fails, for want of a reader or of space, all else is done.
        self._print(console, results, written)
        if problems:
            raise InputError("; ".join(problems))
        if not results["partial"] and not results["images"]:
            raise InputError(f"none of the {len(self.inputs.source)} pictures could be read")

    def _print(self, console: Console, results: dict[str, Any], written: Sequence[Path]) -> None:
        print_results(console, results)
        if results["partial"]:
            more = "; --resume goes on" if self.config.output else ""
            done, count = results["images"], len(self.inputs.source)
            console.print(f"interrupted: {done} of {count} pictures were scored{more}")
        for path in written:
            console.print(f"written: {path}", soft_wrap=True)
