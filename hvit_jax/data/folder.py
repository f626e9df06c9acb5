"""Folders of pictures, one folder a class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from PIL import Image, UnidentifiedImageError

from hvit_jax.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("img_val", "val")
# A file of a few kilobytes may declare any size; decoded, this many take 0.7 GB.
MAX_PIXELS = 1 << 27


class PictureError(InputError):
    """A picture that cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class ImageFolder:
    """Pictures in class folders.

    Attributes:
        root: the folder that was named.
        paths: every picture, relative to `root`, in sorted order.
        labels: the class of every picture, an index into `classes`.
        classes: names of the class folders, sorted.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB; the orientation in EXIF is not applied, as in torchvision."""
        return open_picture(self.root / self.paths[index], self.paths[index])


def open_picture(file: Path | io.BytesIO, name: str) -> Image.Image:
    """Decode a picture to RGB; of an animation, its first frame.

    Raises:
        PictureError: if it cannot be read or decoded, or has more than `MAX_PIXELS`.
    """
    try:
        # Opening a named pipe would wait for ever.
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            raise PictureError(f"picture {name}: not a regular file")
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(
                    f"picture {name}: {image.width} x {image.height} pixels are more than the "
                    f"{MAX_PIXELS / 1e6:.0f} million that are decoded; scale it down"
                )
            image.load()
            image.info.pop("transparency", None)  # Pillow would warn that it ignores it.
            return image.convert("RGB")
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError(f"picture {name}: not a picture that Pillow can read") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"picture {name}: {reason}") from error


def read_folder(path: str | Path, splits: tuple[str, ...] = SPLITS) -> ImageFolder:
    """List the pictures below a folder.

    Args:
        path: holds a folder a class, or a split (`img_val/` or `val/`) that does.
        splits: names of splits to look for.

    Raises:
        InputError: if there is no such folder, or no pictures or no class folders in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{path} is not a folder" if root.exists() else f"{path} does not exist")
    try:
        split = next((split for split in splits if (root / split).is_dir()), "")
        entries = os.scandir(root / split)
        classes = tuple(sorted(entry.name for entry in entries if entry.is_dir()))
        found = [
            (picture, label)
            for label, name in enumerate(classes)
            for picture in _pictures(root, os.path.join(split, name))
        ]
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error
    if not found:
        place = root / split
        what = "no pictures in its class folders" if classes else "no class folders"
        raise InputError(
            f"{place} has {what}; expected {place}/CLASS/PICTURE with one of {' '.join(EXTENSIONS)}"
        )
    found.sort()
    paths, labels = zip(*found, strict=True)
    return ImageFolder(root, paths, labels, classes)


def _pictures(root: Path, name: str) -> list[str]:
    """List the pictures below one class folder, links followed, loops cut."""

    def fail(error: OSError) -> NoReturn:
        raise error

    found, seen = [], set()
    for folder, subfolders, files in os.walk(root / name, onerror=fail, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            subfolders.clear()
            continue
        seen.add(place)
        found += [
            os.path.relpath(os.path.join(folder, file), root)
            for file in files
            if file.lower().endswith(EXTENSIONS)
        ]
    return found
