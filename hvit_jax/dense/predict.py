"""A map of a picture of any size: `predict`, and the two compiled steps that it is made of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num, UInt8
from PIL import Image

from hvit_jax.config import Preprocessing, Windows
from hvit_jax.data.picture import open_picture, to_rgb
from hvit_jax.data.preprocess import normalize
from hvit_jax.dense.windows import Layout, View
from hvit_jax.errors import InputError
from hvit_jax.models.vit import ViT
from hvit_jax.ops.precision import accurate_einsum

Picture = UInt8[np.ndarray, "H W 3"] | Image.Image | str | Path
_STRIP = 64  # Rows of a picture whose scores are in memory at once.
_SIDES = 128  # Sides of pictures are rounded up to multiples: fewer sizes to compile.
_COMPILED: set[Any] = set()  # Sizes that pictures were finished in.


def predict(
    model: ViT,
    picture: Picture,
    *,
    windows: Windows = Windows(),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 2,
) -> np.ndarray:
    """Label every pixel of a picture, or tell its depth.

    The picture is scaled and cut into windows as the checkpoint says, see `hvit_jax.config.Windows`
    and docs/dense-prediction.md; windows overlap where their stride says so, and are averaged. The
    model is compiled once for all pictures.

    Args:
        model: from `hvit_jax.load`, with a decoder.
        picture: uint8 RGB (H, W, 3), a picture of Pillow's, or a file's name.
        windows: what is changed of the model's own.
        scales: sizes at which it is seen, against the usual one; their results are averaged.
        flip: whether it is seen mirrored too, which is averaged likewise.
        batch_size: windows at once. More may be faster on a GPU; the last batch is filled up.

    Returns:
        Classes (H, W) in int32, or depth (H, W) in metres in float32, at the picture's own size.

    Raises:
        InputError: if the model has no decoder, or windows do not fit it.
    """
    return _predict(model, picture, windows, scales, flip, batch_size, scores=False)


def predict_scores(
    model: ViT,
    picture: Picture,
    *,
    windows: Windows = Windows(),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    batch_size: int = 2,
) -> Float[np.ndarray, "H W n"]:
    """Give the probability of every class at every pixel, or depth (H, W, 1); see `predict`."""
    return _predict(model, picture, windows, scales, flip, batch_size, scores=True)


def _predict(model, picture, windows, scales, flip, batch_size, *, scores: bool) -> np.ndarray:
    pixels = read_pixels(picture)
    layout = layout_of(model, windows)
    views = layout.views(pixels, model.preprocessing.mean, scales, flip)
    return map_views(model, layout, views, pixels.shape[:2], batch_size=batch_size, scores=scores)


def read_pixels(picture: Picture) -> UInt8[np.ndarray, "H W 3"]:
    """Read a picture.

    Raises:
        InputError: if it is none, cannot be read, or is no uint8 RGB.
    """
    if isinstance(picture, (str, Path)):
        picture = open_picture(Path(picture), str(picture))
    if isinstance(picture, Image.Image):
        return np.asarray(to_rgb(picture))
    pixels = np.asarray(picture)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise InputError(
            f"a picture is uint8 of shape (height, width, 3), got {pixels.dtype} {pixels.shape}"
        )
    return pixels


def layout_of(model: ViT, windows: Windows = Windows()) -> Layout:
    """Find how pictures become windows for a model.

    Raises:
        InputError: if the model has no decoder, or is made for images of another size.
    """
    layout = Layout.of(model.config, windows.over(model.windows))
    needed = layout.resolution(model.config.patch_size)
    if needed != model.config.image_shape:
        (height, width), (rows, columns) = model.config.image_shape, needed
        raise InputError(
            f"windows of {layout.window[0]} x {layout.window[1]} need a model of {rows} x "
            f"{columns}, this one is of {height} x {width}; load it with resolution={needed}"
        )
    return layout


def map_views(
    model: ViT,
    layout: Layout,
    views: Sequence[View],
    size: tuple[int, int],
    *,
    batch_size: int = 2,
    scores: bool = False,
) -> np.ndarray:
    """Map a picture from its views; see `predict`, and `finish` for what is returned."""
    pieces = [piece for view in views for piece in layout.cut(view)]
    maps = run_windows(model, layout, pieces, batch_size)
    return finish(model, layout, views, maps, size, scores=scores)


def run_windows(
    model: ViT, layout: Layout, pieces: Sequence[Num[np.ndarray, "h w 3"]], batch_size: int
) -> Float[np.ndarray, "windows rows columns n"]:
    """Make the maps of windows, in batches that are filled up."""
    graph, state = nnx.split(model)
    maps = []
    for start in range(0, len(pieces), batch_size):
        batch = np.stack(pieces[start : start + batch_size])
        filled = np.zeros((batch_size, *batch.shape[1:]), batch.dtype)
        filled[: len(batch)] = batch
        found = _run(graph, layout.window, model.preprocessing, state, filled)
        maps.append(np.asarray(found)[: len(batch)])
    return np.concatenate(maps)


def window_maps(
    model: ViT,
    pixels: Num[Array, "B h w 3"],
    window: tuple[int, int],
    preprocessing: Preprocessing,
) -> Float[Array, "B rows columns n"]:
    """Normalise windows, pad them evenly to whole patches, and make their maps."""
    images = normalize(pixels, preprocessing.mean, preprocessing.std)
    return model.masks(pad_evenly(images, model.config.image_shape))


def pad_evenly(images: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Pad images with zeros on all sides; of an odd number the last side gets one more."""
    missing = [side - own for side, own in zip(size, images.shape[1:3], strict=True)]
    around = [(each // 2, each - each // 2) for each in missing]
    return jnp.pad(images, ((0, 0), *around, (0, 0)))


# A model's structure is hashable: JAX itself knows for which ones it has compiled.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(graph, window, preprocessing, state, pixels):
    return window_maps(nnx.merge(graph, state), pixels, window, preprocessing)


def finish(
    model: ViT,
    layout: Layout,
    views: Sequence[View],
    maps: Float[np.ndarray, "windows h w n"],
    size: tuple[int, int],
    *,
    scores: bool = False,
) -> np.ndarray:
    """Make a picture's map of its windows' maps.

    Windows are averaged, and resized to the picture; then classes get probabilities, and views are
    averaged.

    Args:
        model: whose maps they are.
        layout: how its pictures become windows.
        views: the picture's, in the order of the maps.
        maps: of all their windows.
        size: height and width of the picture.
        scores: whether probabilities are returned instead of classes.

    Returns:
        Classes (H, W) in int32, probabilities (H, W, n), or depth: (H, W), as scores (H, W, 1).
    """
    return start_finishing(model, layout, views, maps, size, scores=scores)()


def start_finishing(
    model: ViT,
    layout: Layout,
    views: Sequence[View],
    maps: Float[np.ndarray, "windows h w n"],
    size: tuple[int, int],
    *,
    scores: bool = False,
    compiling: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Callable[[], np.ndarray]:
    """Begin what `finish` does; what is returned waits for the device, and gives the result.

    The first picture of a size is compiled for, in a context that `compiling` makes.
    """
    parts, place = [], 0
    for view in views:
        count = layout.count(view)
        rows, columns = layout.matrices(view, maps.shape[1:3], size)
        rows = _rounded_up(rows).reshape(-1, _STRIP, rows.shape[1])
        laid = layout.assemble(view, maps[place : place + count])
        parts.append((rows, laid, _rounded_up(columns)))
        place += count
    decoder = model.config.decoder
    assert decoder is not None
    sizes = tuple(tuple(each.shape for each in part) for part in parts)
    seen = (sizes, decoder.task, scores)
    with contextlib.nullcontext() if seen in _COMPILED else compiling():
        found = _finish(tuple(parts), decoder.task, scores)
    _COMPILED.add(seen)
    return lambda: np.asarray(found)[: size[0], : size[1]]


def _rounded_up(matrix: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "more columns"]:
    return np.pad(matrix, ((0, -len(matrix) % _SIDES), (0, 0)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _finish(parts: Sequence[Any], task: str, scores: bool) -> Array:
    segments, shares = task == "segmentation", scores or len(parts) > 1

    def strip(rows: tuple[Array, ...]) -> Array:
        maps = []
        for of_view, (_, laid, columns) in zip(rows, parts, strict=True):
            found = accurate_einsum("yi,ijn->yjn", of_view, laid)
            found = accurate_einsum("xj,yjn->yxn", columns, found)
            maps.append(jax.nn.softmax(found) if segments and shares else found)
        total = sum(maps[1:], maps[0])
        if segments and not scores:
            return jnp.argmax(total, axis=-1).astype(jnp.int32)
        mean = total / len(parts)
        return mean if scores else mean[..., 0]

    found = jax.lax.map(strip, tuple(rows for rows, _, _ in parts))
    return found.reshape(-1, *found.shape[2:])
