"""Folders of pictures, one folder a class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from hvit_jax.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = ("img_val", "val")


class PictureError(InputError):
    """A picture that cannot be read; the message names it and says why."""


@dataclass(frozen=True)
class ImageFolder:
    """Pictures in class folders.

    Attributes:
        root: the folder that holds the class folders.
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
        """Decode one picture to RGB; the orientation in EXIF is not applied, as in torchvision.

        Raises:
            PictureError: if it cannot be read or decoded.
        """
        return open_picture(self.root / self.paths[index], self.paths[index])


def open_picture(path: Path, name: str) -> Image.Image:
    """Decode a picture to RGB.

    Args:
        path: the file.
        name: what to call it in an error.

    Raises:
        PictureError: if it cannot be read or decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images", UserWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise PictureError(f"picture {name}: not a picture that Pillow can read") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Warning) as error:
        raise PictureError(f"picture {name}: {error}") from error


def read_folder(path: str | Path) -> ImageFolder:
    """List the pictures below a folder.

    Args:
        path: holds a folder a class, or `img_val/` or `val/` that does.

    Raises:
        InputError: if there is no such folder, or no pictures or no class folders in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{path} is not a folder" if root.exists() else f"{path} does not exist")
    root = next((root / split for split in SPLITS if (root / split).is_dir()), root)
    try:
        classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    except OSError as error:
        raise InputError(f"cannot read {root}: {error.strerror}") from error
    found = [(p, label) for label, name in enumerate(classes) for p in _pictures(root, name)]
    if not found:
        what = "no pictures in its class folders" if classes else "no class folders"
        raise InputError(
            f"{root} has {what}; expected {root}/CLASS/PICTURE with one of {' '.join(EXTENSIONS)}"
        )
    found.sort()
    paths, labels = zip(*found, strict=True)
    return ImageFolder(root, paths, labels, classes)


def _pictures(root: Path, name: str) -> list[str]:
    """List the pictures below one class folder, links followed, loops cut."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root / name, followlinks=True):
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
