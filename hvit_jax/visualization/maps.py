"""Maps of segments or depths in figures: of the dense model, of a method, and where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from hvit_jax.dense.drawing import colour_depth, colour_labels, draw_over

Picture = UInt8[np.ndarray, "H W 3"]
Map = Float[np.ndarray, "h w n"]
_MARK = np.array([255, 0, 64], np.uint8)


def draw_maps(
    pictures: Sequence[Picture], dense: Sequence[Map], reduced: Sequence[Map], method: str
) -> Iterator[tuple[str, list[Picture]]]:
    """Draw the maps of some pictures over them, and what a method changes.

    Args:
        pictures: as they are shown.
        dense: what the dense model gives for each: logits, or depth if there is one channel.
        reduced: what the method gives.
        method: its name.

    Yields:
        Three columns: a title, and a drawing for each picture.
    """
    for title, maps in (("map, dense", dense), (f"map, {method}", reduced)):
        colours = [
            as_large(_colours(each), shown) for each, shown in zip(maps, pictures, strict=True)
        ]
        yield title, [draw_over(*pair) for pair in zip(pictures, colours, strict=True)]
    apart = [_apart(*pair) for pair in zip(dense, reduced, strict=True)]
    if dense[0].shape[-1] == 1:
        most = max(float(each.max()) for each in apart)
        title = f"apart by up to {most:.3g} m"
        drawn = [
            as_large(colour_depth(most - each), picture)  # Light where they are.
            for each, picture in zip(apart, pictures, strict=True)
        ]
    else:
        share = 100 * np.mean([each.mean() for each in apart])
        title = f"they differ: {share:.1f} % of pixels"
        drawn = [
            np.where(as_large(each.astype(np.uint8), picture)[..., None] > 0, _MARK, _grey(picture))
            for each, picture in zip(apart, pictures, strict=True)
        ]
    yield title, drawn


def _colours(output: Map) -> Picture:
    if output.shape[-1] == 1:
        return colour_depth(output[..., 0])
    return colour_labels(output.argmax(-1), output.shape[-1])


def _apart(dense: Map, reduced: Map) -> np.ndarray:
    """Tell for every pixel whether the classes differ, or by how many metres the depths do."""
    if dense.shape[-1] == 1:
        return np.abs(dense - reduced)[..., 0]
    return dense.argmax(-1) != reduced.argmax(-1)


def _grey(picture: Picture) -> Picture:
    return np.repeat(np.asarray(Image.fromarray(picture).convert("L"))[..., None], 3, axis=-1)


def as_large(drawing: np.ndarray, picture: Picture) -> np.ndarray:
    """Enlarge a drawing to the size that its picture is shown in."""
    size = picture.shape[1], picture.shape[0]
    return np.asarray(Image.fromarray(drawing).resize(size, Image.Resampling.NEAREST))
