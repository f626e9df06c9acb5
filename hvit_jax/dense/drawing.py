"""Maps as files: labels as PNGs with a palette, depth in 16 bits, and both over pictures."""

from __future__ import annotations

import colorsys
import functools
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image

from hvit_jax.system.files import write_atomically, writing

_OVER = 0.5  # Of the map, in what is drawn over the picture.
_TURN = 0.618034  # Of the circle of hues, from one class to the next: no two are near.


@functools.cache
def palette(classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """Choose colours in which classes can be told apart; the same for every number of them."""
    colours = [
        colorsys.hsv_to_rgb(index * _TURN % 1, (0.85, 0.55)[index % 2], (1, 0.75)[index // 2 % 2])
        for index in range(classes)
    ]
    return np.rint(255 * np.array(colours)).astype(np.uint8)


def colour_labels(labels: Integer[np.ndarray, "H W"], classes: int) -> UInt8[np.ndarray, "H W 3"]:
    """Colour labels; what is no class is black."""
    colours = np.concatenate([palette(classes), np.zeros((1, 3), np.uint8)])
    return colours[np.where((labels >= 0) & (labels < classes), labels, classes)]


def colour_depth(depth: Float[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Shade depth from near, light, to far, dark, between a picture's least and most."""
    least, most = float(depth.min()), float(depth.max())
    shade = 255 * (1 - (depth - least) / max(most - least, 1e-6))
    return np.repeat(np.rint(shade).astype(np.uint8)[..., None], 3, axis=-1)


def draw_over(
    picture: UInt8[np.ndarray, "H W 3"], colours: UInt8[np.ndarray, "H W 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a coloured map over its picture."""
    mixed = (1 - _OVER) * picture.astype(np.float32) + _OVER * colours
    return np.rint(mixed).astype(np.uint8)


def save_labels(
    folder: Path,
    name: str,
    labels: Integer[np.ndarray, "H W"],
    picture: UInt8[np.ndarray, "H W 3"],
    classes: int,
) -> None:
    """Write NAME.png, whose pixels are the classes, with a palette, and NAME.overlay.jpg.

    More than 256 classes are written as a grey PNG of 16 bits.
    """
    if classes <= 256:
        image = Image.fromarray(labels.astype(np.uint8))
        image.putpalette(palette(classes).tobytes())  # Of a grey picture it makes indices.
    else:
        image = Image.fromarray(labels.astype(np.uint16))
    _write(folder, name, image, draw_over(picture, colour_labels(labels, classes)))


def save_depth(
    folder: Path,
    name: str,
    depth: Float[np.ndarray, "H W"],
    picture: UInt8[np.ndarray, "H W 3"],
    scale: float,
) -> None:
    """Write NAME.png, of 16 bits in steps of `scale` metres, and NAME.overlay.jpg."""
    steps = np.rint(depth / scale).clip(0, 65535).astype(np.uint16)
    _write(folder, name, Image.fromarray(steps), draw_over(picture, colour_depth(depth)))


def _write(folder: Path, name: str, image: Image.Image, over: UInt8[np.ndarray, "H W 3"]) -> None:
    target = folder / name
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    for path, each, kind in (
        (target.with_name(f"{target.name}.png"), image, "PNG"),
        (target.with_name(f"{target.name}.overlay.jpg"), Image.fromarray(over), "JPEG"),
    ):
        content = io.BytesIO()
        each.save(content, kind)
        write_atomically(path, lambda file, content=content: file.write(content.getvalue()))
