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

from hvit_jax.data.picture import open_picture, to_rgb
from hvit_jax.data.preprocess import normalize
from hvit_jax.dense.windows import Layout, View
from hvit_jax.errors import InputError
from hvit_jax.models.vit import ViT
from hvit_jax.ops.arrays import pad_end
from hvit_jax.ops.platform import backend, compiler_options
from hvit_jax.ops.precision import accurate_einsum
from hvit_jax.pictures import Preprocessing, Windows

Picture = UInt8[np.ndarray, "H W 3"] | Image.Image | str | Path
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

    The picture is scaled and cut into windows as the checkpoint says, see
    `hvit_jax.pictures.Windows` and docs/dense-prediction.md; windows overlap where their stride
    says so, and are averaged. The model is compiled once for all pictures.

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
        found = _program()(graph, model.preprocessing, state, filled)
        maps.append(np.asarray(found)[: len(batch)])
    return np.concatenate(maps)


def window_maps(
    model: ViT, pixels: Num[Array, "B h w 3"], preprocessing: Preprocessing
) -> Float[Array, "B rows columns n"]:
    """Normalise windows, pad them evenly to whole patches, and make their maps."""
    images = normalize(pixels, preprocessing.mean, preprocessing.std)
    return model.masks(pad_evenly(images, model.config.image_shape))


def pad_evenly(images: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Pad images with zeros on all sides; of an odd number the last side gets one more."""
    missing = [side - own for side, own in zip(size, images.shape[1:3], strict=True)]
    around = [(each // 2, each - each // 2) for each in missing]
    return jnp.pad(images, ((0, 0), *around, (0, 0)))


@functools.cache
def _program() -> Callable[..., Array]:
    """Compile `window_maps` as a function of a model's structure, and of its weights.

    A structure is hashable: JAX itself knows for which ones it has compiled.
    """

    def run(graph, preprocessing, state, pixels):
        return window_maps(nnx.merge(graph, state), pixels, preprocessing)

    return jax.jit(run, static_argnums=(0, 1), compiler_options=compiler_options())


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
        laid = layout.assemble(view, maps[place : place + count])
        parts.append((_rounded_up(rows), laid, _rounded_up(columns)))
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
    """Finish a map some classes at a time: those of a large picture would take gigabytes."""
    classes = parts[0][1].shape[-1]
    # A CPU's caches hold one class; a GPU needs several to be busy.
    together = 1 if backend() == "cpu" else min(classes, 16)
    laid = [_in_groups(jnp.moveaxis(of_view, -1, 0), together) for _, of_view, _ in parts]
    known = _in_groups(jnp.ones(classes, bool), together)
    shape = (parts[0][0].shape[0], parts[0][2].shape[0])

    def maps(group: tuple[Any, ...]) -> list[Array]:
        found = []
        for (rows, _, columns), of_view in zip(parts, group[:-1], strict=True):
            half = accurate_einsum("yi,cij->cyj", rows, of_view)
            each = accurate_einsum("cyj,xj->cyx", half, columns)
            found.append(jnp.where(group[-1][:, None, None], each, -jnp.inf))
        return found

    groups = (*laid, known)
    if task == "segmentation" and (scores or len(parts) > 1):
        norms = _log_sums(maps, groups, len(parts), shape)

        def values(group: tuple[Any, ...]) -> Array:
            shares = [jnp.exp(each - norm) for each, norm in zip(maps(group), norms, strict=True)]
            return sum(shares[1:], shares[0]) / len(shares)
    else:

        def values(group: tuple[Any, ...]) -> Array:
            each = maps(group)
            return sum(each[1:], each[0]) / len(each)

    if task == "segmentation" and not scores:
        return _largest(values, groups, together, shape)
    found = jax.lax.map(values, groups).reshape(-1, *shape)[:classes]
    return jnp.moveaxis(found, 0, -1) if scores else found[0]


def _in_groups(x: Array, size: int) -> Array:
    """Divide the first axis into groups of a size; what is missing in the last is 0."""
    return pad_end(x, -len(x) % size, axis=0).reshape(-1, size, *x.shape[1:])


def _log_sums(
    maps: Callable[[Any], list[Array]], groups: Any, views: int, shape: tuple[int, int]
) -> list[Array]:
    """Give the logarithm of the sum of the exponentials of all classes, for every view."""

    def add(sums: list[Array], group: Any) -> tuple[list[Array], None]:
        found = [jax.nn.logsumexp(each, axis=0) for each in maps(group)]
        return [jnp.logaddexp(one, other) for one, other in zip(sums, found, strict=True)], None

    nothing = [jnp.full(shape, -jnp.inf) for _ in range(views)]
    return jax.lax.scan(add, nothing, groups)[0]


def _largest(
    values: Callable[[Any], Array], groups: Any, together: int, shape: tuple[int, int]
) -> Array:
    """Find the class of the largest value; the first of several."""

    def compare(best: Any, group: Any) -> tuple[Any, None]:
        most, label, first = best
        for place, each in enumerate(values(group)):
            label = jnp.where(each > most, first + place, label)
            most = jnp.maximum(most, each)
        return (most, label, first + together), None

    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32), jnp.int32(0))
    return jax.lax.scan(compare, start, groups)[0][1]
