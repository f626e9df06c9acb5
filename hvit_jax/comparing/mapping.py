"""Maps of pictures under a setting: segments or depth, beside the truth or the dense model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hvit_jax.checkpoint import Description, fitted_parameters
from hvit_jax.comparing.settings import Setting
from hvit_jax.comparing.trials import Program, Values
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.data.loader import load_rows
from hvit_jax.data.picture import PictureError
from hvit_jax.dense.folders import Scenes
from hvit_jax.dense.metrics import Depth, Metric, Segmentation
from hvit_jax.dense.reading import Read, job_of
from hvit_jax.dense.stream import Job, WindowStream
from hvit_jax.dense.windows import Layout
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.parameters import build_model
from hvit_jax.models.vit import ViT
from hvit_jax.profiling.device import Latest, device_work, program_memory

_SEED = 0  # Of the windows that are timed.


@dataclass(frozen=True)
class FoundMaps:
    """The maps of all pictures, in their order, in their own sizes.

    Attributes:
        maps: classes, or depth in metres.
        measured: what the metric measured of each; None where there is no truth.
    """

    maps: list[np.ndarray]
    measured: np.ndarray | None


@dataclass(frozen=True)
class View:
    """How pictures are seen under a setting: the layout of windows, and how large pictures are."""

    layout: Layout
    scale: float


@dataclass
class Maps:
    """Runs a model that makes maps; see `trials.Bench`.

    Attributes:
        scenes: the pictures that are taken, with their truth if there is any.
        checkpoint: the checkpoint's folder.
        description: what it says.
        layout: how pictures become windows for the model as it is.
        metric: what measures maps.
        workers: processes that decode.
    """

    scenes: Scenes
    checkpoint: Path
    description: Description
    sizes: ViTConfig
    layout: Layout
    metric: Metric
    compute: Compute
    placement: Placement
    batch: int
    workers: int

    def __post_init__(self):
        self._weights = Latest(lambda sizes: fitted_parameters(self.checkpoint, sizes))

    def view_at(self, resolution: tuple[int, int] | None) -> View:
        """Scale windows, and pictures with them, to a resolution; None: leave them as they are."""
        if resolution is None:
            return View(self.layout, 1.0)
        own = self.layout.window
        shares = [new / side for new, side in zip(resolution, own, strict=True)]
        stride = tuple(
            max(1, round(step * share))
            for step, share in zip(self.layout.stride, shares, strict=True)
        )
        layout = dataclasses.replace(self.layout, window=resolution, stride=stride)
        return View(layout, shares[0] if own[0] <= own[1] else shares[1])

    def model(self, setting: Setting) -> ViT:
        """Build the model under a setting."""
        sizes = setting.sizes(self.sizes)
        model = build_model(sizes, setting.reducer, self._weights(sizes), self.compute)
        model.preprocessing = self.description.preprocessing
        return model

    def with_budgets(self, setting: Setting) -> Setting:
        """Give the setting itself: budgets are given; see `trials.Bench`."""
        return setting

    def prepare(self, setting: Setting) -> Program:
        """Compile a setting; see `trials.Bench`."""
        model, view = self.model(setting), self.view_at(setting.resolution)
        stream = WindowStream(model, view.layout, self.batch, self.placement)
        compiled = stream.compile()
        shape = (self.batch, *view.layout.window, 3)
        windows = np.random.default_rng(_SEED).integers(0, 256, shape, np.uint8)
        return Program(
            device_work(lambda: stream.start(windows)),
            program_memory(compiled),
            lambda: self._run(stream, view),
        )

    def jobs(self, view: View, scenes: Scenes, *, draw: bool = False) -> Iterator[Job]:
        """Read pictures as a setting sees them.

        Raises:
            PictureError: for one that cannot be read.
        """
        decoder, mean = self.sizes.decoder, self.description.preprocessing.mean
        assert decoder is not None
        scales = (view.scale,)
        read = Read(scenes, view.layout, mean, scales, False, decoder.outputs, draw, 0)
        with load_rows(read, len(scenes), workers=self.workers) as rows:
            for row in rows:
                job = job_of(row, 0.0)
                if job.problem:
                    raise PictureError(job.problem)
                yield job

    def _run(self, stream: WindowStream, view: View) -> FoundMaps:
        maps, measured = [], []
        for job, found in stream.run(self.jobs(view, self.scenes)):
            assert found is not None
            if not job.finite:
                raise FloatingPointError(
                    f"the map of {self.scenes.paths[job.index]} has numbers that are not finite"
                )
            maps.append(found if isinstance(self.metric, Depth) else _small(found))
            if job.truth is not None:
                measured.append(self.metric.measure(found, job.truth))
        return FoundMaps(maps, np.stack(measured) if measured else None)

    def values(self, found: FoundMaps, dense: FoundMaps) -> tuple[Values, dict[str, float]]:
        """Measure maps beside the truth, and beside the dense model's; see `trials.Bench`."""
        pairs = list(zip(found.maps, dense.maps, strict=True))
        values = {}
        if isinstance(self.metric, Segmentation):
            if found.measured is not None:
                values["miou"] = found.measured
            values["pixels"] = np.array([(mine == theirs).mean() for mine, theirs in pairs])
        else:
            if found.measured is not None:
                values["rmse"] = found.measured
            values["apart"] = np.stack([self.metric.measure(*pair) for pair in pairs])
        return values, {}


def _small(labels: np.ndarray) -> np.ndarray:
    return labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)


def subset(scenes: Scenes, places: Sequence[int]) -> Scenes:
    """Take some of the pictures."""
    paths = tuple(scenes.paths[place] for place in places)
    truths = tuple(scenes.truths[place] for place in places) if scenes.truths else ()
    return dataclasses.replace(scenes, paths=paths, truths=truths)
