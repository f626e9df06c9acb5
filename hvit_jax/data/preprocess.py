"""From a picture to the model's input, exactly as torchvision does it on PIL images."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def resize_and_crop(image: Image.Image, resolution: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Convert to RGB, resize bicubically, cut out the centre.

    The short side becomes the resolution and the long side int(resolution * long / short). For a
    resolution that is not square the picture is resized to cover it, its larger side deciding.

    Args:
        image: a picture of any mode and size.
        resolution: height and width wanted, in pixels.

    Returns:
        Uint8 array (height, width, 3).
    """
    image = image.convert("RGB")
    height, width = resolution
    scale_by_width = image.width * height <= image.height * width
    if scale_by_width:
        size = (width, max(height, int(width * image.height / image.width)))
    else:
        size = (max(width, int(height * image.width / image.height)), height)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left = int(round((image.width - width) / 2.0))
    top = int(round((image.height - height) / 2.0))
    return np.asarray(image.crop((left, top, left + width, top + height)))


def normalize(pixels: UInt8[Array | np.ndarray, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
    """Scale bytes to [0, 1] and normalise them by ImageNet's mean and deviation.

    Args:
        pixels: prepared pictures, from `resize_and_crop`.

    Returns:
        The model's input, in float32.
    """
    scaled = jnp.asarray(pixels, jnp.float32) / 255
    return (scaled - jnp.asarray(MEAN)) / jnp.asarray(STD)
