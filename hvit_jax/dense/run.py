"""A checkpoint over a data set of pictures: `hvit segment` and `hvit depth`."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hvit_jax.checkpoint import (
    Description,
    choose_method,
    describe_checkpoint,
    fitted_parameters,
    read_description,
)
from hvit_jax.config import Decoder, ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.data.loader import load_rows
from hvit_jax.data.picture import PictureError
from hvit_jax.dense.config import DepthConfig, MapConfig, SegmentConfig
from hvit_jax.dense.drawing import save_depth, save_labels
from hvit_jax.dense.folders import Scenes, open_scenes
from hvit_jax.dense.metrics import Depth, Metric, Segmentation, class_names
from hvit_jax.dense.reading import Read, job_of
from hvit_jax.dense.results import print_results, read_results, running_scores, scores
from hvit_jax.dense.stream import Job, WindowStream
from hvit_jax.dense.tally import MapTally
from hvit_jax.dense.windows import Layout, fit_windows
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.results import describe
from hvit_jax.evaluation.resume import INTERVAL, ProgressFolder
from hvit_jax.fields import as_json
from hvit_jax.models.parameters import build_model
from hvit_jax.models.vit import ViT
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.published import describe_configuration
from hvit_jax.reducers import Reducer, warn_without_budgets
from hvit_jax.segmenter import find_segmenter_row
from hvit_jax.system.files import writing
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, show_progress
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.system.signals import sigterm_raises, unmasked


@dataclass(frozen=True)
class Seams:
    """Where tests take hold of a run."""

    # Called with "opened", "begun", "compiled", "picture" (after each one), "mapped" and "written";
    # what it raises stops the run.
    on_stage: Callable[[str], None] = lambda stage: None
    interval: float = INTERVAL  # Seconds between two savings.


@dataclass(frozen=True)
class _Opened:
    """Pictures, checkpoint and method, which fit each other."""

    config: MapConfig
    scenes: Scenes
    description: Description
    sizes: ViTConfig
    decoder: Decoder  # The sizes'.
    layout: Layout
    reducer: Reducer
    metric: Metric
    placement: Placement

    @property
    def batch_size(self) -> int:
        """Windows at once, a multiple of the devices."""
        return self.placement.round_up(self.config.batch_size)

    def model(self) -> ViT:
        """Read the weights, and build the model under the method."""
        assert self.config.checkpoint is not None
        weights = fitted_parameters(self.config.checkpoint, self.sizes)
        model = build_model(self.sizes, self.reducer, weights, self.config.compute)
        model.preprocessing = self.description.preprocessing
        return model

    def nothing(self) -> np.ndarray:
        """Give what is measured of no picture."""
        if isinstance(self.metric, Depth):
            return np.zeros(4)
        return np.zeros((3, len(self.metric.classes)), np.int64)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What results follow from, in the form that they have."""
        return {
            "task": self.decoder.task,
            **describe_configuration(self.sizes, self.reducer.resolve(self.sizes)),
            "dtype": self.config.compute.dtype,
            "gflops": count_flops(self.sizes, self.reducer) / 1e9,
            "published": find_segmenter_row(self.sizes, self.reducer, self.scenes.dataset),
            "decoder": self.decoder.kind,
            "cut": dataclasses.asdict(self.layout),
            **describe_runtime(self.placement.devices),
            "batch_size": self.batch_size,
            **self.scenes.describe(),
            "preprocessing": as_json(self.description.preprocessing),
            **describe_checkpoint(self.config.checkpoint),
            "config": as_json(self.config),
        }


def map_pictures(
    config: SegmentConfig | DepthConfig,
    *,
    console: Console | None = None,
    messages: Console | None = None,
    seams: Seams = Seams(),
) -> dict[str, Any]:
    """Map pictures, measure the maps, print the results and write what the record asks for.

    Args:
        config: what to map, and how.
        console: where the results are printed; default: stdout.
        messages: where progress goes; default: stderr.
        seams: for tests.

    Returns:
        The results, as --output writes them: scores, of every class too, speed, configuration,
        device, versions, and fingerprints of data and checkpoint. With `resume`, those of an
        earlier run if it has written all of them.

    Raises:
        InputError: if an option, data or checkpoint is wrong, a picture or its truth cannot be
            used, a result not be written, or memory runs out; what was measured before is written
            all the same.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM; what was measured before is
            written.
    """
    use_compilation_cache(config.cache)
    console = console or Console(highlight=False, markup=False)
    messages = messages or plain_console(stderr=True)
    progress = ProgressFolder(
        config.output,
        say=messages.print,
        resume=config.resume,
        overwrite=config.overwrite,
        interval=seams.interval,
        read=read_results,
    )
    with sigterm_raises() as check_stop, progress:
        opened = _open(config, messages.print)
        _check_folder(config, opened.scenes)
        about = opened.about
        seams.on_stage("opened")
        tally = MapTally(opened.nothing())
        finished = progress.begin(about, tally, len(opened.scenes))
        if tally.skipped and config.on_error != "skip":
            raise PictureError(f"{tally.skipped[0]}; --on-error skip leaves it out")
        if finished is not None:
            print_results(console, finished)
            return finished
        seams.on_stage("begun")

        def reached(stage: str) -> None:
            progress.save_if_due(tally)
            seams.on_stage(stage)
            check_stop()

        stop = _map(opened, tally, messages, reached, save=config.save_maps)
        results = {**about, "partial": stop is not None, **scores(tally, opened.metric)}
        if config.compare_dense and stop is None:
            beside = dataclasses.replace(opened, reducer=Reducer())
            dense = MapTally(opened.nothing())
            stop = _map(beside, dense, messages, reached, save=None)
            gflops = {"gflops": beside.about["gflops"]}
            results["dense"] = gflops | scores(dense, opened.metric) if stop is None else None
            results["partial"] = stop is not None
        # An error before the first picture leaves nothing to write.
        if results["images"] or not isinstance(stop, InputError):
            progress.conclude(
                results,
                tally,
                len(opened.scenes),
                done="mapped",
                show=print_results,
                console=console,
                on_stage=seams.on_stage,
            )
    if stop is not None:
        raise stop
    return results


def _open(config: MapConfig, say: Callable[[str], object]) -> _Opened:
    """Open pictures and checkpoint, and check that they and the method fit each other."""
    assert config.checkpoint is not None
    description = read_description(config.checkpoint)
    sizes, layout = _sizes(config, description)
    reducer = choose_method(config.reducer, description, say)
    reducer.resolve(sizes)  # Found wrong before thousands of pictures are listed.
    decoder = sizes.decoder
    assert decoder is not None
    if isinstance(config, SegmentConfig):
        wanted = dataclasses.asdict(config.truth)
        metric = Segmentation(class_names(decoder.outputs, description.classes))
    else:
        assert isinstance(config, DepthConfig)
        truth = config.truth
        wanted = {name: getattr(truth, name) for name in ("truth", "split", "depth_scale", "exif")}
        metric = Depth(*(truth.depth_range or decoder.depth_range))
    scenes = open_scenes(str(config.data), **wanted)
    scenes.refuse_other_classes(decoder.outputs, config.checkpoint)
    return _Opened(config, scenes, description, sizes, decoder, layout, reducer, metric, place())


def _sizes(config: MapConfig, description: Description) -> tuple[ViTConfig, Layout]:
    """Give the model's sizes for windows of the size wanted, and how pictures become windows."""
    task = "segmentation" if isinstance(config, SegmentConfig) else "depth"
    sizes = description.config
    if sizes.decoder is None:
        raise InputError(
            f"{config.checkpoint} has no decoder; convert a Segmenter, or a backbone with its "
            "--head FILE, or train one"
        )
    if sizes.decoder.task != task:
        other = {"segmentation": "hvit segment", "depth": "hvit depth"}[sizes.decoder.task]
        raise InputError(
            f"the decoder of {config.checkpoint} is for {sizes.decoder.task}; use {other}"
        )
    return fit_windows(sizes, config.windows.over(description.windows), config.restore)


def _check_folder(config: MapConfig, scenes: Scenes) -> None:
    """Refuse a folder for maps that holds files already, cannot be made, or is one of pictures."""
    folder = config.save_maps
    if folder is None:
        return
    pictures = os.path.commonpath([(scenes.root / path).parent for path in scenes.paths])
    if folder.resolve().is_relative_to(Path(pictures).resolve()):
        raise InputError(
            f"--save-maps {folder} lies among the pictures, where the next run would take maps for "
            f"some; choose a folder outside {pictures}"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if os.listdir(folder) and not config.overwrite and not config.resume:
        raise InputError(f"{folder} holds files already; --overwrite replaces them")


def _map(
    opened: _Opened,
    tally: MapTally,
    messages: Console,
    reached: Callable[[str], None],
    *,
    save: Path | None,
) -> BaseException | None:
    """Map all pictures that are left, and measure them; give what has stopped that."""
    config, count, size = opened.config, len(opened.scenes), opened.batch_size
    try:
        messages.print(f"{count} pictures; {describe(opened.about)}")
        warn_if_slow(config.compute.dtype, messages.print)
        first = tally.totals.pictures
        read = Read(
            opened.scenes,
            opened.layout,
            opened.description.preprocessing.mean,
            tuple(map(float, config.scales)),
            config.flip,
            opened.decoder.outputs,
            draw=save is not None,
            first=first,
        )
        with load_rows(read, count - first, workers=config.workers) as rows:
            smaller = smaller_batch(size, opened.placement.devices)
            with unmasked(), explain_out_of_memory(size, smaller):
                model = opened.model()
                warn_without_budgets(model.reducer, model.config, messages.print)
                started = time.perf_counter()
                stream = WindowStream(model, opened.layout, size, opened.placement)
                stream.compile()
                messages.print(f"compiled in {time.perf_counter() - started:.1f} s")
                reached("compiled")
                with show_progress(messages, count, first, unit="pictures") as show:
                    for _ in _measured(opened, stream, rows, tally, save):
                        show(tally.totals.pictures, running_scores(tally, opened.metric))
                        reached("picture")
        reached("mapped")
    except (KeyboardInterrupt, InputError) as error:
        return error
    return None


def _measured(
    opened: _Opened,
    stream: WindowStream,
    rows: Iterator[dict[str, Any]],
    tally: MapTally,
    save: Path | None,
) -> Iterator[None]:
    """Add every picture to the tally, and save its map."""
    started = [time.perf_counter()]

    def jobs() -> Iterator[Job]:
        asked = time.perf_counter()
        for number, row in enumerate(rows):
            now = time.perf_counter()
            if not number:
                started[0] = now
            yield job_of(row, now - asked if number else 0.0)
            asked = time.perf_counter()

    for job, found in stream.run(jobs()):
        if found is None:
            if opened.config.on_error != "skip":
                raise PictureError(f"{job.problem}; --on-error skip leaves such pictures out")
            tally.add(None, job, started[0], stream.take_seconds())
        else:
            if save is not None:
                _save(opened, save, job, found)
            nothing, metric = opened.nothing(), opened.metric
            measured = nothing if job.truth is None else metric.measure(found, job.truth)
            tally.add(measured, job, started[0], stream.take_seconds())
        yield


def _save(opened: _Opened, folder: Path, job: Job, found: np.ndarray) -> None:
    name = os.path.splitext(opened.scenes.paths[job.index])[0]
    assert job.picture is not None
    if isinstance(opened.metric, Segmentation):
        save_labels(folder, name, found, job.picture, len(opened.metric.classes))
    else:
        assert isinstance(opened.config, DepthConfig)
        save_depth(folder, name, found, job.picture, opened.config.truth.depth_scale)
