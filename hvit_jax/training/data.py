"""Training batches: shuffled, augmented, and the same again after a resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image, ImageOps

from hvit_jax.data.loader import explain_lost_worker, parse_flags, start_worker
from hvit_jax.data.picture import PictureError
from hvit_jax.data.source import Source
from hvit_jax.training.augment import rand_augment

# In effect without end; Grain's own "infinite" overflows with batches of one picture.
_EPOCHS = 2**31


@dataclass(frozen=True)
class Augmented:
    """Pictures that come out otherwise each time, as ImageNet models are usually trained.

    Attributes:
        source: the pictures.
        resolution: height and width of the model's input.
        crop_scale: least share of a picture's area in a crop; 1 takes all of it.
        flip: whether half of the pictures are mirrored.
        rand_augment: operations of RandAugment and their strength, if any.
        interpolation: how pictures are resized, as `Preprocessing` has it.
        skip_unreadable: take the next picture instead of one that cannot be read.
    """

    source: Source
    resolution: tuple[int, int]
    crop_scale: float = 1.0
    flip: bool = False
    rand_augment: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    skip_unreadable: bool = False

    def __call__(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        """Open a picture; crop, resize, mirror and change it."""
        height, width = self.resolution
        place, image = self._open(index)
        box = self._crop(image.width, image.height, random)
        how = Image.Resampling[self.interpolation.upper()]
        image = image.resize((width, height), how, box=box)
        if self.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.rand_augment:
            image = rand_augment(image, *self.rand_augment, random)
        return {
            "pixels": np.asarray(image),
            "label": np.int32(self.source.labels[place]),
            "skipped": np.int32(index if place != index else -1),
        }

    def _open(self, index: int) -> tuple[int, Image.Image]:
        """Open a picture, or the first one after it that can be read; give its place too."""
        last = len(self.source) - 1 if self.skip_unreadable else 0
        for more in range(last):
            place = (index + more) % len(self.source)
            with contextlib.suppress(PictureError):
                return place, self.source.open(place)
        place = (index + last) % len(self.source)
        return place, self.source.open(place)

    def _crop(self, width, height, random):
        """Choose a box of random area, and of an aspect between 3:4 and 4:3 if there is room."""
        if self.crop_scale == 1:
            return 0, 0, width, height
        area = width * height * random.uniform(self.crop_scale, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
        left, top = random.uniform(0, width - w), random.uniform(0, height - h)
        return left, top, left + w, top + h


def training_batches(
    pictures: Augmented,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    first_step: int = 0,
    note: Callable[[str], object] = print,
) -> Iterator[dict[str, np.ndarray]]:
    """Make batches without end; batch `i` is the same whatever step the iteration starts at.

    An epoch is one pass over the pictures in a random order; a batch may begin in one and end in
    the next. In several processes, each gets every so many rows of the batches.

    Args:
        pictures: what to make them of.
        batch_size: pictures in a batch, of all processes together.
        seed: of order and augmentation.
        workers: processes that decode; 0 decodes in threads of this process.
        first_step: the batch to begin with.
        note: is told of each picture that is skipped, once.

    Yields:
        `pixels`, uint8 (batch, height, width, 3), and `label`, int32 (batch,).

    Raises:
        PictureError: for a picture that cannot be read.
        WorkerLost: if a worker has died.
    """
    parse_flags()
    processes = jax.process_count()
    dataset = grain.MapDataset.range(len(pictures.source)).seed(seed).shuffle().repeat(_EPOCHS)
    dataset = dataset.random_map(pictures)
    if processes > 1:  # Shuffled and augmented before: the same pictures for any number.
        dataset = dataset[jax.process_index() :: processes]
    dataset = dataset.batch(batch_size // processes)
    rest = dataset.slice(slice(first_step, None)).to_iter_dataset(
        grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    )
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        rest = rest.mp_prefetch(options, worker_init_fn=start_worker)
    told = set()
    for batch in explain_lost_worker(iter(rest)):
        for index in set(batch.pop("skipped").tolist()) - {-1} - told:
            told.add(index)
            note(_why_skipped(pictures.source, index))
        yield batch


def _why_skipped(source: Source, index: int) -> str:
    try:
        source.open(index)
    except PictureError as error:
        return f"skipped: {error}"
    return f"skipped: picture {source.paths[index]}"
