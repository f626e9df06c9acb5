"""One picture, decoded to 8-bit RGB."""

from __future__ import annotations

import contextlib
import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from hvit_jax.errors import InputError

# A file of a few kilobytes may declare any size; decoded, this many take 0.7 GB.
MAX_PIXELS = 1 << 27
ORIENTATION = 0x0112  # The number of this tag in EXIF.
BITS, PHOTOMETRIC = 0x0102, 0x0106  # In TIFF: bits of a channel; whether 0 is white or black.
# How a picture is turned upright, by its orientation in EXIF; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(InputError):
    """A picture that cannot be read; the message names it and says why."""


def open_picture(file: Path | io.BytesIO, name: str, *, exif: bool = False) -> Image.Image:
    """Decode a picture to RGB; of an animation, its first frame.

    Args:
        file: where it lies, or its bytes.
        name: what messages call it.
        exif: turn it as the orientation in its EXIF data says, as viewers do. torchvision's
            datasets do not.

    Raises:
        PictureError: if it cannot be read or decoded, has more than `MAX_PIXELS`, or pixels that
            `to_rgb` refuses.
    """
    try:
        # Opening a named pipe would wait for ever.
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise InputError("not a regular file")
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{image.width} x {image.height} pixels are more than the "
                    f"{MAX_PIXELS / 1e6:.0f} million that are decoded; scale it down"
                )
            image.load()
            image.info.pop("transparency", None)  # Pillow would warn that it ignores it.
            turn = turn_of(image) if exif else None
            picture = to_rgb(image)
            return picture if turn is None else picture.transpose(turn)
    except UnidentifiedImageError as error:
        raise PictureError(f"picture {name}: not a picture that Pillow can read") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"picture {name}: {reason}") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Find how a picture is turned upright; damaged EXIF data says nothing of that."""
    with contextlib.suppress(Exception):  # Pillow raises almost anything on it.
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to 8-bit RGB; of 12 or 16 bits of grey the upper 8 are kept.

    Raises:
        InputError: for 32-bit integers or floats, whose black and white are not known.
    """
    # Pillow reads 16-bit PGM into 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        tags = getattr(image, "tag_v2", {})  # TIFF's, which Pillow heeds for 8 bits only.
        (bits,), white_is_zero = tags.get(BITS, (16,)), tags.get(PHOTOMETRIC) == 0
        grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - grey if white_is_zero else grey)
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise InputError(f"its pixels are {kind}; save it with 8 or 16 bits a channel")
    return image.convert("RGB")
