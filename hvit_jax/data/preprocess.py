"""From a picture to the model's input, exactly as torchvision, timm or transformers with PIL."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, UInt8
from PIL import Image

from hvit_jax.data.picture import to_rgb
from hvit_jax.pictures import MEAN, STD, Preprocessing, Triple


def resized_size(
    size: tuple[int, int], resolution: tuple[int, int], preprocessing: Preprocessing
) -> tuple[int, int]:
    """Find the size that a picture is resized to before it is cut.

    Args:
        size: the picture's height and width.
        resolution: height and width wanted in the end.
        preprocessing: the share that the crop keeps, its mode, and whose rounding.

    Returns:
        Height and width, in pixels.
    """
    (height, width), share = size, preprocessing.crop_pct
    rows, columns = (int(side / share) for side in _crop(resolution, preprocessing))
    if preprocessing.crop_mode == "squash":
        return rows, columns
    border = preprocessing.crop_mode == "border"
    if border or (preprocessing.rounding == "timm" and rows != columns):
        choose = max if border else min
        ratio = choose(height / rows, width / columns)
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    if width * rows <= height * columns:
        return max(rows, int(columns * height / width)), columns
    return rows, max(columns, int(rows * width / height))


def _crop(resolution: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Give the crop's height and width, with what is cut off after it."""
    (height, width), (below, right) = resolution, preprocessing.uncovered
    return height + below, width + right


def corner(side: int, wanted: int, rounding: str) -> int:
    """Find where the crop begins along one side; before the picture where that is too short."""
    if side < wanted:
        return -((wanted - side) // 2)
    # Python rounds halves to even, as torchvision and timm do.
    return (side - wanted) // 2 if rounding == "transformers" else round((side - wanted) / 2)


def resize_and_crop(
    image: Image.Image,
    resolution: tuple[int, int],
    preprocessing: Preprocessing = Preprocessing(),
) -> UInt8[np.ndarray, "H W 3"]:
    """Convert to RGB, resize, cut out the centre.

    By default the picture is resized bicubically until it just covers the resolution.

    Args:
        image: a picture of any size, of a mode that `to_rgb` takes.
        resolution: height and width wanted, in pixels.
        preprocessing: how it is resized and cut; checkpoints store theirs.

    Returns:
        Uint8 array (height, width, 3).

    Raises:
        InputError: for a picture of 32-bit integers or floats.
    """
    image = to_rgb(image)
    height, width = resized_size((image.height, image.width), resolution, preprocessing)
    image = image.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
    top, left = (
        corner(side, wanted, preprocessing.rounding)
        for side, wanted in zip((height, width), _crop(resolution, preprocessing), strict=True)
    )
    red, green, blue = (round(255 * value) for value in preprocessing.mean)
    canvas = Image.new("RGB", (resolution[1], resolution[0]), (red, green, blue))
    canvas.paste(image, (-left, -top))
    return np.asarray(canvas)


def normalize(
    pixels: Num[Array | np.ndarray, "*B H W 3"], mean: Triple = MEAN, std: Triple = STD
) -> Float[Array, "*B H W 3"]:
    """Scale bytes to [0, 1], subtract the mean and divide by the deviation.

    Args:
        pixels: prepared pictures, such as from `resize_and_crop`, from 0 to 255.
        mean: of red, green and blue; default: ImageNet's.
        std: their standard deviations; default: ImageNet's.

    Returns:
        The model's input, in float32.
    """
    scaled = jnp.asarray(pixels, jnp.float32) / 255
    each = (1,) * (scaled.ndim - 1) + (3,)  # JAX's strict modes want the ranks to be the same.
    return (scaled - jnp.reshape(jnp.array(mean), each)) / jnp.reshape(jnp.array(std), each)
