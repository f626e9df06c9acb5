"""What a model wants of pictures: how they are prepared, and cut into windows for maps."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

from hvit_jax.config import LARGEST
from hvit_jax.fields import Options, given, option

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
Triple = tuple[float, float, float]  # Of red, green and blue.
# ImageNet's mean and standard deviation of red, green and blue, on a scale from 0 to 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing(Options):
    """How a picture becomes a model's input; the default is SWAG's.

    The picture is resized to the model's resolution divided by `crop_pct`, rounded down, and cut to
    the resolution. `crop_pct=0.875` at 224 is torchvision's `Resize(256)` and `CenterCrop(224)`.

    Raises:
        InputError: for a value that is not accepted.
    """

    called: ClassVar[str] = "{}"
    crop_pct: float = option(
        1.0, "share of the resized picture's side that the crop keeps", above=0, most=1
    )
    crop_mode: str = option(
        "center",
        "center keeps the aspect and cuts off what is too long; squash changes the aspect; border "
        "shows the whole picture with margins in the mean colour",
        choices=("center", "squash", "border"),
    )
    rounding: str = option(
        "torchvision",
        "whose rounding of sizes and margins; they differ by one pixel",
        choices=("torchvision", "timm", "transformers"),
    )
    interpolation: str = option(
        "bicubic", "how pictures are resized, with antialiasing", choices=INTERPOLATIONS
    )
    mean: tuple[float, float, float] = option(MEAN, "subtracted from red, green and blue in [0, 1]")
    std: tuple[float, float, float] = option(STD, "what they are divided by then", above=0)
    uncovered: tuple[int, int] = option(
        (0, 0),
        "rows and columns of the crop beyond the resolution, below and on the right, that no patch "
        "covers: they are cut off (SigLIP: 6 of 384 pixels, in patches of 14)",
        least=0,
        most=LARGEST,
    )


_preparing = functools.partial(option, group="preprocessing")


@dataclass(frozen=True)
class Preparing(Options):
    """What a command changes of the preprocessing that a checkpoint stores."""

    crop_pct: float | None = _preparing(
        None,
        "share of the resized picture's side that the crop keeps, such as 0.875 (default: the "
        "checkpoint's)",
        above=0,
        most=1,
        metavar="SHARE",
    )
    interpolation: str | None = _preparing(
        None, "how pictures are resized (default: the checkpoint's)", choices=INTERPOLATIONS
    )
    exif: bool = _preparing(
        False, "turn pictures upright by the orientation in their EXIF data; torchvision does not"
    )

    def changed(self, stored: Preprocessing) -> Preprocessing:
        """Give a checkpoint's preprocessing with what is changed of it."""
        changes = {name: value for name, value in given(self).items() if name != "exif"}
        return dataclasses.replace(stored, **changes)


_windows = functools.partial(option, None, group="windows that pictures are cut into")
_sides = functools.partial(_windows, most=LARGEST)


@dataclass(frozen=True)
class Windows(Options):
    """How a picture of any size is scaled, and cut into windows of one size, to make a map of it.

    Checkpoints store theirs, and commands may change it. What is None in both is as the texts say.

    Raises:
        InputError: for a value that is not accepted.
    """

    short_side: int | None = _sides(
        "scale pictures so that the short side has so many pixels; 0: not at all (default: the "
        "checkpoint's, else 0)",
        metavar="PIXELS",
        least=0,
    )
    long_side: int | None = _sides(
        "but so that the long side has no more than these (default: the checkpoint's, else any)",
        metavar="PIXELS",
        least=1,
    )
    window: int | tuple[int, int] | None = _sides(
        "size of a window, one number or height,width (default: the checkpoint's, else its "
        "resolution)",
        least=1,
    )
    stride: int | tuple[int, int] | None = _sides(
        "pixels from one window to the next, at most a window (default: the checkpoint's, else "
        "windows side by side)",
        least=1,
    )
    small: str | None = _windows(
        "what becomes of pictures that are smaller than a window (default: the checkpoint's, else "
        "enlarge)",
        choices=("enlarge", "pad"),
    )

    def over(self, stored: Windows) -> Windows:
        """Give a checkpoint's windows with what is changed of them."""
        return dataclasses.replace(stored, **given(self))


def crop_share(kept: int, resized: int) -> float:
    """Find the `crop_pct` under which a side of `resized` pixels is cut to `kept`, exactly."""
    share = kept / resized
    # For sides such as 354 and 224 the quotient rounds to a number that gives one pixel less.
    return share if int(kept / share) == resized else math.nextafter(share, 0)
