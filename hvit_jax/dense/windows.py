"""Pictures of any size as windows of one size, and the windows' maps as one map of the picture.

All that happens to a map after the model is linear and acts along each axis alone: enlarging a
window's map to the window, averaging where windows overlap, cutting off what was padded, resizing
to the picture. So each axis has one matrix for all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Num, UInt8

from hvit_jax.config import ViTConfig, as_pair
from hvit_jax.errors import InputError
from hvit_jax.pictures import Triple, Windows


def resize_axis(x: Num[np.ndarray, " n *rest"], size: int) -> Num[np.ndarray, " m *rest"]:
    """Resize the first axis bilinearly: half-pixel centres, no antialiasing, the edge repeated.

    Args:
        x: any array; bytes become float32.
        size: entries wanted.
    """
    if len(x) == size:
        return x
    places = ((np.arange(size) + 0.5) * (len(x) / size) - 0.5).clip(0, len(x) - 1)
    low = places.astype(int)
    share = (places - low).astype(np.float32).reshape(-1, *(1,) * (x.ndim - 1))
    return x[low] * (1 - share) + x[np.minimum(low + 1, len(x) - 1)] * share


def resize_pixels(
    pixels: Num[np.ndarray, "h w C"], size: tuple[int, int]
) -> Num[np.ndarray, "H W C"]:
    """Resize a picture as `resize_axis` does; the result is not rounded."""
    rows = resize_axis(pixels, size[0])
    return np.ascontiguousarray(resize_axis(rows.swapaxes(0, 1), size[1]).swapaxes(0, 1))


@dataclass(frozen=True)
class View:
    """A picture as it is cut into windows.

    Attributes:
        pixels: at least as large as a window; bytes, or float32 from 0 to 255 where they were
            enlarged or padded.
        shown: rows and columns that show the picture; what is beyond was padded.
        mirrored: whether left and right are exchanged.
    """

    pixels: Num[np.ndarray, "h w 3"]
    shown: tuple[int, int]
    mirrored: bool = False


@dataclass(frozen=True)
class Layout:
    """How pictures become windows for one model: `Windows` with nothing left open.

    Attributes:
        window: height and width of a window.
        stride: rows and columns from one to the next.
        short_side: what pictures are scaled to; 0: they are not.
        long_side: at most; None: any.
        enlarge: whether pictures smaller than a window are enlarged; else they are padded with
            zeros, on the right and below, after they are normalised.
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    short_side: int = 0
    long_side: int | None = None
    enlarge: bool = True

    @classmethod
    def of(cls, config: ViTConfig, windows: Windows) -> Layout:
        """Fill in what is open, for a model.

        Args:
            config: the model's sizes.
            windows: what is wanted.

        Raises:
            InputError: if the model has no decoder, or the sizes do not fit each other.
        """
        if config.decoder is None:
            raise InputError("the model has no decoder, so that it makes no maps")
        window = as_pair(windows.window or config.image_shape)
        stride = as_pair(windows.stride or window)
        for side in window:
            # Heads of DINOv2's take windows of any size, which are padded inside.
            if side % config.patch_size and not config.decoder.taps:
                near = max(1, round(side / config.patch_size)) * config.patch_size
                raise InputError(
                    f"--window {side} is not a multiple of the patch size {config.patch_size}; "
                    f"the nearest that is: {near}"
                )
        for step, side in zip(stride, window, strict=True):
            if step > side:
                raise InputError(
                    f"--stride {step} leaves pixels between windows of {side}; give at most {side}"
                )
        enlarge = windows.small != "pad"
        return cls(window, stride, windows.short_side or 0, windows.long_side, enlarge)

    def resolution(self, patch_size: int) -> tuple[int, int]:
        """Give the size of the model's images: a window's, up to whole patches."""
        height, width = (-(-side // patch_size) * patch_size for side in self.window)
        return height, width

    def scaled_size(self, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
        """Give the size that a picture of a size is scaled to, times a scale."""
        if self.short_side:
            factor = int(self.short_side * scale) / min(size)
            if self.long_side:
                factor = min(factor, int(self.long_side * scale) / max(size))
        else:
            factor = scale
        height, width = (max(1, int(side * factor + 0.5)) for side in size)
        return height, width

    def enlarged_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Give the size at which a picture just covers a window; as it is if it does."""
        (height, width), (rows, columns) = size, self.window
        if height >= rows and width >= columns:
            return size
        if rows / height >= columns / width:
            return rows, max(columns, int(rows * (width / height)))
        return max(rows, int(columns * (height / width))), columns

    def view(self, pixels: Num[np.ndarray, "h w 3"], mean: Triple) -> View:
        """Make a scaled picture at least as large as a window.

        Args:
            pixels: the picture.
            mean: what padded pixels have, so that they are zero once normalised.
        """
        size = (pixels.shape[0], pixels.shape[1])
        if self.enlarge:
            pixels = resize_pixels(pixels, self.enlarged_size(size))
            return View(pixels, (pixels.shape[0], pixels.shape[1]))
        full = tuple(map(max, size, self.window))
        if full != size:
            canvas = np.full((*full, 3), 255 * np.array(mean), np.float32)
            canvas[: size[0], : size[1]] = pixels
            pixels = canvas
        return View(pixels, size)

    def views(
        self,
        picture: UInt8[np.ndarray, "H W 3"],
        mean: Triple,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> list[View]:
        """Make all views of a picture, whose results are averaged.

        Args:
            picture: in its own size.
            mean: as for `view`.
            scales: how large it is, against what the layout says.
            flip: whether each is seen mirrored too.
        """
        views, size = [], (picture.shape[0], picture.shape[1])
        for scale in scales:
            wanted = self.scaled_size(size, scale)
            scaled = picture
            if wanted != size:
                scaled = np.rint(resize_pixels(picture, wanted)).astype(np.uint8)
            views.append(self.view(scaled, mean))
            if flip:
                seen = self.view(np.ascontiguousarray(scaled[:, ::-1]), mean)
                views.append(View(seen.pixels, seen.shown, mirrored=True))
        return views

    def starts(self, size: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """List the rows and the columns at which windows begin, in a view of a size."""
        rows, columns = map(_starts, size, self.window, self.stride)
        return rows, columns

    def count(self, view: View) -> int:
        """Count a view's windows."""
        rows, columns = self.starts(view.pixels.shape[:2])
        return len(rows) * len(columns)

    def cut(self, view: View) -> Iterator[Num[np.ndarray, "h w 3"]]:
        """Cut a view into its windows, row by row."""
        height, width = self.window
        rows, columns = self.starts(view.pixels.shape[:2])
        for top in rows:
            for left in columns:
                yield view.pixels[top : top + height, left : left + width]

    def matrices(
        self, view: View, grid: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Float[np.ndarray, "H rows"], Float[np.ndarray, "W columns"]]:
        """Write what happens to the windows' maps as a matrix for each axis.

        Args:
            view: what the windows were cut from; only its sizes matter.
            grid: rows and columns of a window's map.
            size: height and width of the map wanted.

        Returns:
            For maps laid side by side as the windows lie, with `rows` and `columns` in all, what
            makes the map wanted of them, from the left and the right.
        """
        sides = zip(view.pixels.shape[:2], view.shown, self.window, self.stride, strict=True)
        rows, columns = (
            _merging(*each, of_map, wanted)
            for each, of_map, wanted in zip(sides, grid, size, strict=True)
        )
        return rows, columns[::-1] if view.mirrored else columns

    def assemble(
        self, view: View, maps: Float[np.ndarray, "windows h w n"]
    ) -> Float[np.ndarray, "rows columns n"]:
        """Lay the maps of a view's windows side by side, as `matrices` wants them."""
        rows, columns = map(len, self.starts(view.pixels.shape[:2]))
        _, height, width, channels = maps.shape
        laid = maps.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
        return laid.reshape(rows * height, columns * width, channels)


def fit_windows(
    config: ViTConfig, windows: Windows, restore: str | None = None
) -> tuple[ViTConfig, Layout]:
    """Give a model's sizes for its windows, and how pictures become these.

    Args:
        config: the model's sizes.
        windows: what is wanted.
        restore: where a method's tokens become the full grid; None: where the sizes say so.

    Raises:
        InputError: if the model has no decoder, or the sizes do not fit each other.
    """
    if restore is not None and config.decoder is not None:
        config = replace(config, decoder=replace(config.decoder, restore=restore))
    layout = Layout.of(config, windows)
    return replace(config, resolution=layout.resolution(config.patch_size)), layout


def _starts(side: int, window: int, stride: int) -> tuple[int, ...]:
    return (*range(0, side - window, stride), side - window)


@functools.lru_cache(maxsize=256)
def _merging(
    side: int, shown: int, window: int, stride: int, grid: int, size: int
) -> Float[np.ndarray, "size columns"]:
    """Make a matrix of `Layout.matrices`, along one axis."""
    enlarging = resize_axis(np.eye(grid, dtype=np.float32), window)
    starts = _starts(side, window, stride)
    spread = np.zeros((side, len(starts), grid), np.float32)
    counts = np.zeros((side, 1, 1), np.float32)
    for place, start in enumerate(starts):
        spread[start : start + window, place] = enlarging
        counts[start : start + window] += 1
    return resize_axis((spread / counts)[:shown].reshape(shown, -1), size)
