"""Training batches: shuffled, augmented, and the same again after a resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from PIL import Image

from hvit_jax.data.folder import ImageFolder
from hvit_jax.data.loader import explain_lost_worker, parse_flags, start_worker
from hvit_jax.training.config import TrainConfig

# In effect without end; Grain's own "infinite" overflows with batches of one picture.
_EPOCHS = 2**31


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop and horizontal flip, as ImageNet models are usually trained with.

    Attributes:
        resolution: height and width of the crop after resizing, in pixels.
        crop_scale: least share of the picture's area that a crop covers; 1 takes the whole picture.
        flip: mirror every other picture.
    """

    resolution: tuple[int, int]
    crop_scale: float
    flip: bool

    def __call__(self, image: Image.Image, random: np.random.Generator) -> np.ndarray:
        """Augment one picture.

        Args:
            image: an RGB picture.
            random: the source of chance for this picture and epoch.

        Returns:
            Uint8 array (height, width, 3).
        """
        height, width = self.resolution
        box = self._crop(image.width, image.height, random)
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image)
        return pixels[:, ::-1] if self.flip and random.random() < 0.5 else pixels

    def _crop(self, width, height, random):
        """Choose a box of random area, and of an aspect between 3:4 and 4:3 if there is room."""
        if self.crop_scale == 1:
            return 0, 0, width, height
        area = width * height * random.uniform(self.crop_scale, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, np.sqrt(area * aspect)), min(height, np.sqrt(area / aspect))
        left, top = random.uniform(0, width - w), random.uniform(0, height - h)
        return left, top, left + w, top + h


@dataclass(frozen=True)
class _Load:
    """Opens a picture and augments it."""

    folder: ImageFolder
    augmentation: Augmentation

    def __call__(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        pixels = self.augmentation(self.folder.open(index), random)
        return {"pixels": pixels, "label": np.int32(self.folder.labels[index])}


def training_batches(
    config: TrainConfig, folder: ImageFolder, resolution: tuple[int, int], first_step: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Make batches without end; batch `i` is the same whatever step the iteration starts at.

    In several processes, each gets every so many rows of the batches.

    Args:
        config: has the batch's size, the augmentation, and the seed of both.
        folder: the pictures.
        resolution: height and width of the augmented pictures.
        first_step: number of the first batch.

    Yields:
        `pixels`, uint8 (batch, height, width, 3), and `label`, int32 (batch,).

    Raises:
        PictureError: while iterating, for a picture that cannot be read.
        WorkerLost: while iterating, if a worker has died.
    """
    parse_flags()
    processes = jax.process_count()
    augmentation = Augmentation(resolution, config.crop_scale, config.flip)
    dataset = grain.MapDataset.range(len(folder)).seed(config.seed).shuffle().repeat(_EPOCHS)
    dataset = dataset.random_map(_Load(folder, augmentation))
    if processes > 1:  # Shuffled and augmented before: the same pictures for any number.
        dataset = dataset[jax.process_index() :: processes]
    dataset = dataset.batch(config.batch_size // processes)
    rest = dataset.slice(slice(first_step, None)).to_iter_dataset(
        grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    )
    if config.workers:
        options = grain.MultiprocessingOptions(num_workers=config.workers)
        rest = rest.mp_prefetch(options, worker_init_fn=start_worker)
    return explain_lost_worker(iter(rest))
