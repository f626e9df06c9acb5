"""Batches of pictures, decoded beside the program, in order, each picture once; and who decodes."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, TypeVar, cast

import grain
import numpy as np
from absl import flags
from jaxtyping import UInt8

from hvit_jax.data.picture import PictureError
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.data.source import Source
from hvit_jax.errors import InputError, first_line
from hvit_jax.pictures import Preprocessing
from hvit_jax.system.library_messages import ignore_warnings_of_pillow, is_dead_worker

Item = TypeVar("Item")
_THREADS = 4
_BATCHES_AHEAD = 2
_ROWS_AHEAD = 2  # Of every worker.
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class Batch:
    """Pictures in the source's order, padded to the full batch.

    Attributes:
        pixels: prepared pictures; zeros for padding and for pictures that could not be read.
        indices: places in the source of the pictures that the batch covers, without padding.
        problems: why a picture could not be read, by its row.
    """

    pixels: UInt8[np.ndarray, "B H W 3"]
    indices: tuple[int, ...]
    problems: dict[int, str]

    @property
    def valid(self) -> np.ndarray:
        """Mark the rows that hold a picture, as a boolean array (B,)."""
        valid = np.arange(len(self.pixels)) < len(self.indices)
        valid[list(self.problems)] = False
        return valid


@dataclass(frozen=True)
class _Decode:
    """Read and prepare one picture; a failure travels with its index instead of stopping Grain."""

    source: Source
    resolution: tuple[int, int]
    preprocessing: Preprocessing

    def __call__(self, index: int) -> dict[str, Any]:
        try:
            image, problem = self.source.open(index), ""
            pixels = resize_and_crop(image, self.resolution, self.preprocessing)
        except (PictureError, MemoryError) as error:
            pixels = np.zeros((*self.resolution, 3), np.uint8)
            problem = str(error) or f"picture {self.source.paths[index]}: not enough memory"
        return {"index": index, "pixels": pixels, "problem": problem}


class _Stateless(Iterator[Item]):
    """What Grain prefetches, without a state to save.

    Its own iterators, asked for theirs, would start one worker after the other.
    """

    def __init__(self, items: Iterable[Item]):
        self._items = iter(items)

    def __next__(self) -> Item:
        return next(self._items)

    def get_state(self) -> dict[str, Any]:
        """Give an empty state; who continues loads the pictures that are left instead."""
        return {}


def _batch(pictures: Iterator[dict[str, Any]], count: int, shape: tuple[int, ...]) -> Batch:
    """Make a batch of the next pictures; counting spares the wait for workers to say no more."""
    rows = list(itertools.islice(pictures, count))
    if len(rows) != count:
        raise RuntimeError(f"Grain ended {count - len(rows)} pictures too early")
    pixels = np.zeros(shape, np.uint8)
    for place, row in enumerate(rows):
        pixels[place] = row["pixels"]
    problems = {place: row["problem"] for place, row in enumerate(rows) if row["problem"]}
    indices = tuple(row["index"] for row in rows)
    for row in rows:
        row.clear()  # Grain may keep the rows alive, and with them their shared memory.
    return Batch(pixels, indices, problems)


def fits_shared_memory(pictures: int, resolution: tuple[int, int]) -> bool:
    """Tell whether Grain's shared memory holds what is on its way; containers often have 64 MB."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # Not Linux: no such limit is known.
        return True
    return free > 2 * pictures * 3 * resolution[0] * resolution[1]


@contextlib.contextmanager
def load_batches(
    source: Source,
    resolution: tuple[int, int],
    *,
    batch_size: int,
    workers: int,
    batches: int | None = None,
    preprocessing: Preprocessing = Preprocessing(),
    shared_memory: Callable[[int, tuple[int, int]], bool] = fits_shared_memory,
) -> Iterator[Iterator[Batch]]:
    """Start to decode a source's pictures ahead of their use.

    Args:
        source: the pictures.
        resolution: height and width of the prepared pictures.
        batch_size: rows of a batch; the last one is padded.
        workers: processes that decode; 0 decodes in threads of this process.
        batches: how many to make, the last ones empty if need be; default: as many as it takes.
        preprocessing: how pictures are resized and cut; checkpoints store theirs.
        shared_memory: tells whether pictures of this size, and so many, fit into shared memory.

    Yields:
        Batches in the source's order. Leaving the context stops the workers.

    Raises:
        InputError: for a batch size below 1 or a negative number of workers, or if a worker dies.
    """
    if batch_size < 1 or workers < 0:
        raise InputError(
            f"batch size must be at least 1 and workers at least 0, got {batch_size} and {workers}"
        )
    decode, pictures = _Decode(source, resolution, preprocessing), len(source)
    workers = min(workers, pictures)
    ahead = max(2, -(-batch_size // max(1, workers)))
    pipes = workers > 0 and not shared_memory(workers * (ahead + 2), resolution)
    count = -(-pictures // batch_size) if batches is None else batches
    rows = _decoded(decode, pictures, workers, ahead, through_pipes=pipes)
    starts, shape = range(0, count * batch_size, batch_size), (batch_size, *resolution, 3)
    sizes = (max(0, min(batch_size, pictures - start)) for start in starts)
    with _beside((_batch(rows, size, shape) for size in sizes), rows, workers) as prefetched:
        yield prefetched


@contextlib.contextmanager
def load_rows(
    decode: Callable[[int], dict[str, Any]],
    count: int,
    *,
    workers: int,
) -> Iterator[Iterator[dict[str, Any]]]:
    """Start to read a number of pictures ahead of their use, each as it is.

    Args:
        decode: makes a row of arrays of a picture's place; workers get a copy of it.
        count: how many pictures there are.
        workers: as for `load_batches`.

    Yields:
        The rows in order. Leaving the context stops the workers.

    Raises:
        InputError: if a worker dies.
    """
    workers = min(workers, count)
    # Their sizes are not known, so neither is whether shared memory would hold them.
    rows = _decoded(decode, count, workers, _ROWS_AHEAD, through_pipes=True)
    with _beside(itertools.islice(rows, count), rows, workers) as prefetched:
        yield prefetched


@contextlib.contextmanager
def _beside(made: Iterable[Item], rows: Any, workers: int) -> Iterator[Iterator[Item]]:
    """Make items in a thread beside the program, of Grain's rows, which end with the context."""
    prefetched = grain.experimental.ThreadPrefetchDatasetIterator(
        cast(Any, _Stateless(made)), prefetch_buffer_size=_BATCHES_AHEAD
    )
    try:
        # Ctrl-C reaches every process of a terminal. Threads and processes inherit the mask, so
        # workers never see it, and this process stops them in its own time. The tracker is started
        # before, because its start unblocks the signal in the thread that it happens in.
        if workers:
            resource_tracker.ensure_running()
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            prefetched.start_prefetch()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        yield explain_lost_worker(prefetched)
    finally:
        prefetched.close()
        rows.close()


def parse_flags() -> None:
    """Mark absl's flags as parsed: Grain reads them, and only absl programs parse them."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _decoded(decode, count, workers, ahead, *, through_pipes):
    parse_flags()
    rows = grain.MapDataset.range(count).map(decode)
    if not workers:
        threads = min(_THREADS, os.cpu_count() or 1)
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(rows.to_iter_dataset(reading))
    reading = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = rows.to_iter_dataset(reading)
    if through_pipes:
        pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, pipes)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    return iter(dataset.mp_prefetch(options, worker_init_fn=start_worker))


class WorkerLost(InputError):
    """A process that decodes pictures has died."""


def start_worker(index: int, count: int) -> None:
    """Keep a worker of Grain's off the accelerator, deaf to Ctrl-C, and end it with its program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"
    ignore_warnings_of_pillow()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def explain_lost_worker(batches: Iterator[Item]) -> Iterator[Item]:
    """Pass batches of Grain's on; a worker that dies raises `WorkerLost`."""
    try:
        yield from batches
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise WorkerLost(
            "a process that decodes pictures has died, perhaps for want of memory "
            f"({first_line(error)}); try fewer --workers or a smaller --batch-size"
        ) from error
