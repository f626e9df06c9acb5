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

from hvit_jax.checkpoint import Description
from hvit_jax.data.loader import explain_lost_worker, parse_flags, start_worker
from hvit_jax.data.picture import PictureError
from hvit_jax.data.source import Source
from hvit_jax.dense.folders import Scenes
from hvit_jax.dense.metrics import IGNORED
from hvit_jax.dense.windows import Layout
from hvit_jax.pictures import Triple
from hvit_jax.training.augment import rand_augment
from hvit_jax.training.config import TrainConfig

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
        place, image = first_readable(self, index)
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

    def read(self, place: int) -> Image.Image:
        """Decode a picture."""
        return self.source.open(place)

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
class AugmentedMaps:
    """Pictures whose pixels are labelled: windows cut out of them at random, at random scales.

    Attributes:
        source: the pictures, and their truth.
        classes: how many there are.
        layout: how pictures become windows when the model is used.
        mean: red, green and blue, from 0 to 1, of what is beyond a picture.
        scales: least and largest size, against the one that the layout gives a picture.
        flip: whether half of the windows are mirrored.
        skip_unreadable: take the next picture instead of one that cannot be read.
    """

    source: Scenes
    classes: int
    layout: Layout
    mean: Triple
    scales: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    skip_unreadable: bool = False

    def __call__(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        """Open a picture and its truth; scale, cut and mirror both alike."""
        place, (image, truth) = first_readable(self, index)
        box, (height, width) = self._choose((image.height, image.width), random)
        size, extent, how = (width, height), Image.Transform.EXTENT, Image.Resampling
        # Without antialiasing, as pictures are scaled when the model is used.
        shown = image.transform(size, extent, box, how.BILINEAR)
        true = Image.fromarray(truth).transform(size, extent, box, how.NEAREST)
        pixels = np.full((*self.layout.window, 3), np.rint(255 * np.array(self.mean)), np.uint8)
        labels = np.full(self.layout.window, IGNORED, np.int32)
        pixels[:height, :width] = np.asarray(shown)
        labels[:height, :width] = np.asarray(true)
        if self.flip and random.random() < 0.5:
            pixels, labels = pixels[:, ::-1], labels[:, ::-1]
        return {
            "pixels": np.ascontiguousarray(pixels),
            "label": np.ascontiguousarray(labels),
            "skipped": np.int32(index if place != index else -1),
        }

    def read(self, place: int) -> tuple[Image.Image, np.ndarray]:
        """Decode a picture, and its labels."""
        image = self.source.open(place)
        labels = self.source.truth(place, (image.height, image.width), self.classes)
        assert labels is not None, "only pictures with truth are opened for training"
        return image, labels

    def _choose(self, size: tuple[int, int], random: np.random.Generator):
        """Choose what of a picture is shown, as Pillow's box; and in how many rows and columns."""
        scaled = self.layout.scaled_size(size, random.uniform(*self.scales))
        shown = tuple(map(min, scaled, self.layout.window))
        starts = [random.integers(0, all - own + 1) for all, own in zip(scaled, shown, strict=True)]
        (top, bottom), (left, right) = (
            (own * start / all, own * (start + part) / all)
            for own, all, start, part in zip(size, scaled, starts, shown, strict=True)
        )
        return (left, top, right, bottom), shown


def first_readable(pictures: Augmented | AugmentedMaps, index: int) -> tuple[int, Any]:
    """Read a picture or, if those that cannot be read are skipped, the first after it that can be.

    Returns:
        Its place, and what was read.
    """
    count = len(pictures.source)
    last = count - 1 if pictures.skip_unreadable else 0
    for more in range(last):
        place = (index + more) % count
        with contextlib.suppress(PictureError):
            return place, pictures.read(place)
    place = (index + last) % count
    return place, pictures.read(place)


def augment(
    config: TrainConfig, begun: Description, pictures: Source | Scenes
) -> Augmented | AugmentedMaps:
    """Make what makes a run's training pictures.

    Args:
        config: the run's options.
        begun: describes the model.
        pictures: whose classes the model learns; scenes: those of their pixels.
    """
    skip = config.on_error == "skip"
    if isinstance(pictures, Scenes):
        layout, classes = Layout.of(begun.config, begun.windows), len(begun.classes)
        mean = begun.preprocessing.mean
        return AugmentedMaps(pictures, classes, layout, mean, config.scale_range, config.flip, skip)
    return Augmented(
        pictures,
        begun.config.image_shape,
        config.crop_scale,
        config.flip,
        config.rand_augment,
        begun.preprocessing.interpolation,
        skip_unreadable=skip,
    )


def training_batches(
    pictures: Augmented | AugmentedMaps,
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
        `pixels`, uint8 (batch, height, width, 3), and `label`, int32 (batch,); for maps (batch,
        height, width).

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
            note(_why_skipped(pictures, index))
        yield batch


def _why_skipped(pictures: Augmented | AugmentedMaps, index: int) -> str:
    try:
        pictures.read(index)
    except PictureError as error:
        return f"skipped: {error}"
    return f"skipped: picture {pictures.source.paths[index]}"
