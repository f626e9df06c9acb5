"""One evaluation: everything put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hvit_jax.checkpoint import describe_checkpoint, fitted_parameters
from hvit_jax.costs import count_flops
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.loader import Batch
from hvit_jax.data.picture import PictureError
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.inputs import open_inputs
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.results import (
    describe,
    print_results,
    running_scores,
    scores,
    write_predictions,
)
from hvit_jax.evaluation.resume import INTERVAL, ProgressFolder
from hvit_jax.evaluation.step import Step, compile_step
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model
from hvit_jax.models.vit import ViT
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.published import describe_configuration, find_published
from hvit_jax.system.files import write_json
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, show_progress
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.system.signals import sigterm_raises

# What scored pictures depend on, so that --resume needs the same; batch and devices may change.
_RESULTS_DEPEND_ON = ("method", "args", "model", "device", "matmul_precision", "versions")
_RESULTS_DEPEND_ON += ("data_sha256", "checkpoint_sha256")
# Results of processes are added up, so these must be the same in all of them.
_SAME_EVERYWHERE = ("args", "versions", "matmul_precision", "data_sha256", "checkpoint_sha256")


@dataclass(frozen=True)
class Seams:
    """Where tests take hold of an evaluation."""

    compile: Callable[[ViT, int, Placement], Step] = compile_step
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
        fingerprints of data and checkpoint.

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
    folder = ProgressFolder(config, messages, active=first, interval=seams.interval)
    with sigterm_raises() as check_stop, folder as progress:
        evaluation = _Evaluation(config, messages, progress, seams)
        # The workers start to decode while the model compiles.
        with evaluation.load() as batches:
            stop = evaluation.score(batches, check_stop)
            results = {**evaluation.about, "partial": stop is not None, **scores(evaluation.tally)}
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
        self.inputs = open_inputs(config, config.reducer)
        self.source, sizes = self.inputs.source, self.inputs.sizes
        if self.inputs.note is not None:
            messages.print(self.inputs.note)
        warn_if_slow(config.compute.dtype, messages.print)
        parameters = fitted_parameters(self.inputs.checkpoint, sizes)
        self.model = build_model(sizes, config.reducer, parameters, config.compute)
        seams.on_stage("opened")
        self.placement, count = place(), len(self.source)
        self.batch_size = self.placement.round_up(min(config.batch_size, count))
        self.about = self._describe()
        self.text = f"{count} pictures, {len(self.source.classes)} classes; {describe(self.about)}"
        same = {name: self.about[name] for name in _SAME_EVERYWHERE}
        same |= {name: self.about["config"][name] for name in ("compute", "on_error")}
        check_same(f"batches of {self.batch_size}; {self.text}", **same)
        self.tally = Tally(keep_logits=config.predictions is not None)
        progress.begin(self._settings(), self.tally, count)
        self.first = gather(self.tally.totals.pictures)[0]
        self.sharding = BatchSharding(count, self.batch_size, first=self.first)
        seams.on_stage("begun")

    def _describe(self) -> dict[str, Any]:
        """Give what the results say besides the scores."""
        model, inputs = self.model, self.inputs
        return {
            **describe_configuration(model.config, model.reducer),
            "dtype": model.dtype.name,
            "gflops": count_flops(model.config, model.reducer) / 1e9,
            "published": find_published(model.config, model.reducer),
            **describe_runtime(self.placement.devices),
            "processes": self.placement.processes,
            "batch_size": self.batch_size,
            "data": inputs.data,
            "data_sha256": data_sha256(inputs.source),
            "checkpoint": str(inputs.checkpoint),
            **describe_checkpoint(inputs.checkpoint),
            "compile_seconds": None,
            "config": as_json(self.config),
        }

    def _settings(self) -> dict[str, Any]:
        """List what scored pictures depend on; DATA and --checkpoint say where it lies."""
        config = self.about["config"]
        options = {name: self.about[name] for name in ("resolution", "data", "checkpoint")}
        options |= {**config["compute"], "predictions": config["predictions"]}
        return {**{name: self.about[name] for name in _RESULTS_DEPEND_ON}, "options": options}

    def load(self) -> AbstractContextManager[Iterator[Batch]]:
        """Start to decode the pictures that are left."""
        return self.sharding.load(self.source, self.model.config.image_shape, self.config.workers)

    def score(
        self, batches: Iterator[Batch], check_stop: Callable[[], None]
    ) -> KeyboardInterrupt | InputError | None:
        """Score what is left; returns what stopped it before the end, if anything did."""
        size = self.batch_size
        try:
            self.messages.print(self.text)
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
        step = self.seams.compile(self.model, self.batch_size, self.placement)
        self.about["compile_seconds"] = time.perf_counter() - started
        self.messages.print(f"compiled in {self.about['compile_seconds']:.1f} s")
        self.seams.on_stage("compiled")
        with show_progress(self.messages, len(self.source), self.first, unit="pictures") as show:

            def on_batch(tally: Tally) -> None:
                show(tally.totals.pictures, running_scores(tally))
                self.progress.save_if_due(tally)
                self.seams.on_stage("batch")
                check_stop()

            score(
                step,
                batches,
                self.inputs.labels,
                self.tally,
                self.sharding,
                self.placement.shard_batch,
                skip_unreadable=self.config.on_error == "skip",
                on_batch=on_batch,
            )

    def finish(self, results: dict[str, Any], console: Console) -> None:
        """Write and print the results, in the first process, which does that for all."""
        written, problems = self._write(results)
        self.seams.on_stage("written")
        if results["partial"] or problems:
            self.progress.save(self.tally)
            self.progress.keep |= bool(written)
        else:
            self.progress.remove()
        # Only now: where printing fails, for want of a reader or of space, all else is done.
        print_results(console, results)
        count = len(self.source)
        if results["partial"]:
            more = "; --resume goes on" if self.config.output else ""
            console.print(f"interrupted: {results['images']} of {count} pictures were scored{more}")
        for path in written:
            console.print(f"written: {path}", soft_wrap=True)
        if problems:
            raise InputError("; ".join(problems))
        if not results["partial"] and not results["images"]:
            raise InputError(f"none of the {count} pictures could be read")

    def _write(self, results: dict[str, Any]) -> tuple[list[Path], list[str]]:
        """Write what is asked for: the files that were written, and what is wrong with others."""
        written, problems = [], []
        # The results come last: they are the sign that all is done.
        for path in filter(None, (self.config.predictions, self.config.output)):
            try:
                if path == self.config.output:
                    write_json(path, results)
                else:
                    write_predictions(path, self.tally, self.inputs)
                written.append(path)
            except InputError as error:
                problems.append(str(error))
        return written, problems
