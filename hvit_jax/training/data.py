"""Training batches: shuffled, augmented, and the same again after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image, ImageOps

from hvit_jax.data.loader import explain_lost_worker, parse_flags, start_worker
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
    """

    source: Source
    resolution: tuple[int, int]
    crop_scale: float = 1.0
    flip: bool = False
    rand_augment: tuple[int, int] | None = None

    def __call__(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        """Open a picture; crop, resize, mirror and change it."""
        height, width = self.resolution
        image = self.source.open(index)
        box = self._crop(image.width, image.height, random)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if self.flip and random.random() < 0.5:
            image = ImageOps.mirror(image)
        if self.rand_augment:
            image = rand_augment(image, *self.rand_augment, random)
        return {"pixels": np.asarray(image), "label": np.int32(self.source.labels[index])}

    def _crop(
        self, width: int, height: int, random: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """Choose a box of random area, and of an aspect between 3:4 and 4:3 if there is room."""
        if self.crop_scale == 1:
            return 0, 0, width, height
        area = width * height * random.uniform(self.crop_scale, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
        left, top = random.uniform(0, width - w), random.uniform(0, height - h)
        return left, top, left + w, top + h


def training_batches(
    pictures: Augmented, *, batch_size: int, seed: int, workers: int = 0, first_step: int = 0
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
    return explain_lost_worker(iter(rest))
