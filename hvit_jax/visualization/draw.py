"""Drawing groups of patches and heat maps into a picture, as arrays of pixels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

DIMMED = 0.22
SHADE = (28, 32, 46)
OUTLINE = (255, 255, 255)
# From black over purple, red and orange to light yellow, at even distances.
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def draw_groups(
    pixels: UInt8[np.ndarray, "H W 3"],
    groups: Int[np.ndarray, " P"],
    grid: tuple[int, int],
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw a picture as a method sees it.

    A patch on its own shows what is in it. Groups of several have their mean colour, and an outline
    wherever they meet another group. Dropped patches are dark.

    Args:
        pixels: the picture, of any size that the grid divides.
        groups: a group for every patch, row-major; -1 for a dropped one.
        grid: rows and columns of patches.

    Returns:
        The drawing, of the same size.
    """
    rows, columns = grid
    height, width = pixels.shape[:2]
    labels = groups.reshape(grid)
    patches = pixels.reshape(rows, height // rows, columns, width // columns, 3).swapaxes(1, 2)
    painted = patches.astype(np.float32)
    _, places, counts = np.unique(groups, return_inverse=True, return_counts=True)
    merged = ((counts[places] > 1) & (groups >= 0)).reshape(grid)
    for group in np.unique(labels[merged]):
        painted[labels == group] = patches[labels == group].mean((0, 1, 2))
    dropped = labels < 0
    # A shade of blue, so that a dropped patch of a black background is seen to be dropped.
    painted[dropped] = DIMMED * painted[dropped].mean(-1, keepdims=True) + np.array(SHADE)
    drawing = painted.swapaxes(1, 2).reshape(height, width, 3).round().astype(np.uint8)
    line = max(1, min(height // rows, width // columns) // 16)
    _outline(drawing, labels, merged, line)
    _outline(drawing.swapaxes(0, 1), labels.T, merged.T, line)
    return drawing


def _outline(drawing, labels, merged, line):
    """Draw lines below patches of another group than the next row's, if one of both is merged."""
    height, width = drawing.shape[0] // labels.shape[0], drawing.shape[1] // labels.shape[1]
    edges = (labels[:-1] != labels[1:]) & (merged[:-1] | merged[1:])
    for row, column in np.argwhere(edges):
        top, left = (row + 1) * height - line // 2, column * width
        drawing[top : top + line, left : left + width] = OUTLINE


def enlarged(shape: tuple[int, int], *, side: int = 640) -> tuple[int, int]:
    """Scale a picture's height and width by a whole number, to about `side` pixels."""
    factor = max(1, round(side / max(shape)))
    return shape[0] * factor, shape[1] * factor


def heat_map(
    attention: Float[np.ndarray, " P"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Spread attention smoothly over a picture.

    Args:
        attention: of every patch, row-major.
        grid: rows and columns of patches.
        size: height and width of the picture in pixels.

    Returns:
        Values from 0 to 1. The largest two per cent of the patches all count as 1, for single
        patches that get far more than the others would hide these.
    """
    top = np.quantile(attention, 0.98) or attention.max() or 1.0
    small = np.clip(attention / top, 0, 1).astype(np.float32).reshape(grid)
    smooth = Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth), 0, 1)


def lay_over(
    picture: UInt8[np.ndarray, "H W 3"], heat: Float[np.ndarray, "H W"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Colour a picture by heat from 0 to 1; where there is little, it shines through in grey."""
    grey = picture.mean(-1, keepdims=True)
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(heat, stops, channel) for channel in zip(*HEAT, strict=True)], -1)
    share = (0.35 + 0.5 * heat)[..., None]
    return ((1 - share) * grey + share * colour).round().astype(np.uint8)
