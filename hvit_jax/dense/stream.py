"""Windows of all pictures, in full batches on all devices; pictures come out in their order.

A picture's result does not depend on those that share its batches: every window is a row of its
own, and the last batch is filled up with empty ones.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Num

from hvit_jax.dense.picture import start_finishing, window_maps
from hvit_jax.dense.windows import Layout, View
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.vit import ViT

_IN_FLIGHT = 2


@dataclass
class Job:
    """A picture on its way.

    Attributes:
        index: its place among all.
        size: height and width.
        views: what is cut into windows; none for a picture that could not be read.
        truth: what is true of it, if that is known.
        picture: its pixels, where they are drawn with the map.
        problem: why it could not be read.
        waited: seconds that the program waited for it.
        maps: those of its windows that are known.
        windows: how many there are.
        finite: whether all numbers of the maps are finite.
    """

    index: int
    size: tuple[int, int]
    views: list[View] = field(default_factory=list)
    truth: np.ndarray | None = None
    picture: np.ndarray | None = None
    problem: str = ""
    waited: float = 0.0
    maps: list[np.ndarray] = field(default_factory=list)
    windows: int = 0
    finite: bool = True


class WindowStream:
    """A model that maps windows in batches, and pictures in a stream."""

    def __init__(self, model: ViT, layout: Layout, batch_size: int, placement: Placement):
        """Put the weights on the devices; nothing is compiled yet.

        Args:
            model: with a decoder, for images of the size of the layout's windows.
            layout: how pictures become windows.
            batch_size: windows at once, a multiple of the devices.
            placement: the devices.
        """
        self._model, self._layout, self._batch_size = model, layout, batch_size
        with_weights, weights = part_weights(model)

        def step(weights, pixels):
            return window_maps(with_weights(weights), pixels, model.preprocessing)

        self._step = placement.compile(step, arrays=1)
        self._programs: dict[np.dtype, jax.stages.Compiled] = {}
        self._weights, self._put = placement.replicate(weights), placement.shard_batch
        self._pieces: list[np.ndarray] = []
        self._owners: list[Job] = []
        self._flight: collections.deque[tuple[list[Job], jax.Array]] = collections.deque()
        self._jobs: collections.deque[Job] = collections.deque()
        self._finishing: collections.deque[tuple[int, Job, Callable[[], np.ndarray]]]
        self._finishing = collections.deque()
        self._batches, self._compiling = 0, 0.0

    def compile(self) -> jax.stages.Compiled:
        """Compile for windows in bytes, and run once."""
        shape, pixels = (self._batch_size, *self._layout.window, 3), np.dtype(np.uint8)
        program = self._program(shape, pixels)
        jax.block_until_ready(self.start(np.zeros(shape, pixels)))
        return program

    def start(self, windows: Num[np.ndarray, "B h w 3"]) -> jax.Array:
        """Hand a full batch of windows to the devices; gives their maps."""
        return self._program(windows.shape, windows.dtype)(self._weights, self._put(windows))

    def _program(self, shape: tuple[int, ...], dtype: np.dtype) -> jax.stages.Compiled:
        """Compile for windows of a type, once."""
        if dtype not in self._programs:
            pixels = jax.ShapeDtypeStruct(shape, dtype)
            self._programs[dtype] = self._step.lower(self._weights, pixels).compile()
        return self._programs[dtype]

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, np.ndarray | None]]:
        """Map pictures.

        Args:
            jobs: the pictures.

        Yields:
            Every picture, in order, with its labels or depth (H, W); None if it could not be read.
        """
        for job in jobs:
            self._jobs.append(job)
            job.windows = sum(map(self._layout.count, job.views))
            for view in job.views:
                for piece in self._layout.cut(view):
                    self._pieces.append(piece)
                    self._owners.append(job)
                    if len(self._pieces) == self._batch_size:
                        self._dispatch()
            yield from self._done(self._batches - _IN_FLIGHT)
        if self._pieces:
            self._dispatch()
        while self._flight:
            self._collect()
        yield from self._done(self._batches)

    def take_seconds(self) -> float:
        """Give the seconds that went into compiling for new sizes, since the last call."""
        seconds, self._compiling = self._compiling, 0.0
        return seconds

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Take the time of compiling, which no device uses for work that counts."""
        jax.block_until_ready([maps for _, maps in self._flight])
        started = time.perf_counter()
        yield
        self._compiling += time.perf_counter() - started

    def _dispatch(self) -> None:
        """Hand a batch to the devices; then read the result of the one before the last."""
        rows = np.stack(self._pieces)  # In float32 where one of them is.
        batch = np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
        batch[: len(rows)] = rows
        with contextlib.nullcontext() if rows.dtype in self._programs else self._uncounted():
            maps = self.start(batch)
        self._flight.append((self._owners, maps))
        self._pieces, self._owners, self._batches = [], [], self._batches + 1
        if len(self._flight) > _IN_FLIGHT:
            self._collect()

    def _collect(self) -> None:
        """Read the oldest batch, and begin to finish the pictures that are complete by it."""
        owners, maps = self._flight.popleft()
        for job, found in zip(owners, np.asarray(maps), strict=False):
            job.maps.append(found)
            job.finite &= bool(np.isfinite(found).all())
        while self._jobs and len(self._jobs[0].maps) == self._jobs[0].windows:
            self._finish(self._jobs.popleft())

    def _finish(self, job: Job) -> None:
        def nothing() -> Any:
            return None

        wait = nothing
        if job.views:
            maps = np.stack(job.maps)
            wait = start_finishing(
                self._model, self._layout, job.views, maps, job.size, compiling=self._uncounted
            )
        job.maps, job.views = [], []
        self._finishing.append((self._batches, job, wait))

    def _done(self, batch: int) -> Iterator[tuple[Job, np.ndarray | None]]:
        """Give the pictures that were finished behind a batch, or one before it.

        To wait for the last ones would leave the devices without work meanwhile.
        """
        if not self._flight:  # Pictures that cannot be read have no batch that brings them out.
            while self._jobs and len(self._jobs[0].maps) == self._jobs[0].windows:
                self._finish(self._jobs.popleft())
        while self._finishing and self._finishing[0][0] <= batch:
            _, job, wait = self._finishing.popleft()
            yield job, wait()
