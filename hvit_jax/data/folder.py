"""Folders of pictures: what in them is a split, a class or a picture, and what is left out."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from PIL import Image

from hvit_jax.data.picture import open_picture
from hvit_jax.errors import InputError

# Of torchvision's ImageFolder, and others that Pillow reads.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".avif", ".jfif", ".jpe", ".jp2", ".j2k"),
)
# Names of splits in small letters, the first that is there is read.
TRAIN = ("train", "training", "img_train")
TEST = ("test", "testing")
SPLITS = ("img_val", "val", "validation", "valid", *TEST)
# What systems and tools put between the data, beside names that begin with a dot.
_NO_DATA = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir"),
    *("lost+found", "$recycle.bin", "system volume information"),
}
_BESIDE = "pictures in no class folder"
_NAMED = 5  # classes, in a message


@dataclass(frozen=True)
class ImageFolder:
    """Pictures in class folders.

    Attributes:
        root: the folder that was named.
        paths: every picture, relative to `root`, in sorted order.
        labels: the class of every picture, an index into `classes`; -1 where no classes were read.
        classes: names of the class folders, in sorted order; by number, where they are the numbers
            from 0 or 1 on.
        exif: whether pictures are turned as their EXIF data says.
        notes: what a user should know: what was left out, and which classes are empty.
    """

    root: Path
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    exif: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB."""
        return open_picture(self.root / self.paths[index], self.paths[index], exif=self.exif)


def read_folder(
    path: str | Path,
    splits: tuple[str, ...] = SPLITS,
    *,
    exif: bool = False,
    labelled: bool | None = True,
    hint: str = "",
) -> ImageFolder:
    """List the pictures below a folder.

    Args:
        path: holds a folder a class, or a split (such as `val/`) that does.
        splits: names of splits to look for, in small letters; the first that is there is read.
        exif: turn pictures as their EXIF data says, when they are opened.
        labelled: whether folders are classes; if not, all pictures below are listed, without
            labels. None: they are where there are any.
        hint: what an error proposes where pictures lie in no class folder.

    Raises:
        InputError: if there is no such folder, or no pictures or no class folders in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{path} is not a folder" if root.exists() else f"{path} does not exist")
    left_out: Counter[str] = Counter()
    try:
        split, notes = _find_split(root, splits, labelled is not False)
        if labelled is None:
            labelled = _has_folders(root / split)
        classes = _classes(root / split, left_out) if labelled else ()
        listed = [_pictures(root, os.path.join(split, name), left_out) for name in classes or ("",)]
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}") from error
    if labelled and not classes or not any(listed):
        raise _nothing_found(root / split, classes, left_out, labelled, hint)
    found = [
        (picture, label if labelled else -1)
        for label, pictures in enumerate(listed)
        for picture in pictures
    ]
    paths, labels = zip(*sorted(found), strict=True)
    if left_out:
        notes.append(f"left out: {_counted(left_out)}")
    if empty := [name for name, pictures in zip(classes, listed, strict=False) if not pictures]:
        more = ", ..." if len(empty) > _NAMED else ""
        count = "a class" if len(empty) == 1 else f"{len(empty)} classes"
        notes.append(f"no pictures in {count}: {', '.join(empty[:_NAMED])}{more}")
    # macOS takes letters and their accents apart, in folders' names; others compare them as one.
    names = tuple(unicodedata.normalize("NFC", name) for name in classes)
    return ImageFolder(root, paths, labels, names, exif, tuple(notes))


def _find_split(root: Path, splits: Sequence[str], labelled: bool) -> tuple[str, list[str]]:
    """Find the folder of a split, "" if there is none, and what a user should know of the choice.

    A folder of such a name that has no folders in it may also be a class, such as `train` beside
    `bus` and `car`; it is a split where all folders beside it have names of splits.
    """
    folders = [entry.name for entry in os.scandir(root) if entry.is_dir() and _is_data(entry.name)]
    named = sorted(name for name in folders if name.lower() in (*TRAIN, *SPLITS))
    alone = len(named) == len(folders)
    found = [
        name
        for wanted in splits
        for name in named
        if name.lower() == wanted and (alone or not labelled or _has_folders(root / name))
    ]
    if found:
        others = [f"{name}/" for name in found[1:]]
        return found[0], [f"reading {found[0]}/, not {', '.join(others)}"] if others else []
    if named and alone:
        raise InputError(
            f"{root} holds {', '.join(f'{name}/' for name in named)}, none of which is "
            f"{' or '.join(f'{name}/' for name in splits)}; name the folder to read, such as "
            f"{root / named[0]}"
        )
    return "", []


def first_number(names: Sequence[str]) -> int | None:
    """Find the first number, 0 or 1, where names are all the numbers from it on, padded or not."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return None
    numbers = sorted(map(int, names))
    return next((n for n in (0, 1) if numbers == list(range(n, n + len(names)))), None)


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _NO_DATA


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() and _is_data(entry.name) for entry in os.scandir(folder))


def _classes(folder: Path, left_out: Counter[str]) -> tuple[str, ...]:
    """List class folders, by number where that is all they are; count the pictures beside them."""
    _, folders, files = next(os.walk(folder, onerror=_fail, followlinks=True))
    left_out.update(f"{name}/" for name in folders if not _is_data(name))
    beside = [name for name in files if _is_data(name) and name.lower().endswith(EXTENSIONS)]
    left_out.update({_BESIDE: len(beside)} if beside else {})
    names = sorted(filter(_is_data, folders))
    return tuple(names if first_number(names) is None else sorted(names, key=int))


def _fail(error: OSError) -> NoReturn:
    raise error


def _pictures(root: Path, name: str, left_out: Counter[str]) -> list[str]:
    """List the pictures below one folder, links followed, loops cut; count what is none."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root / name, onerror=_fail, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            subfolders.clear()
            continue
        seen.add(place)
        left_out.update(f"{each}/" for each in subfolders if not _is_data(each))
        subfolders[:] = filter(_is_data, subfolders)
        for file in files:
            if not _is_data(file):
                left_out["hidden files"] += 1
            elif file.lower().endswith(EXTENSIONS):
                found.append(os.path.relpath(os.path.join(folder, file), root))
            else:
                left_out[os.path.splitext(file)[1].lower() or "files without an extension"] += 1
    return found


def _counted(left_out: Counter[str]) -> str:
    """Write folders by name, and files by kind and number."""
    return ", ".join(
        name if name.endswith("/") else f"{name} ({count})"
        for name, count in sorted(left_out.items(), key=lambda item: (item[0][-1] != "/", item[0]))
    )


def _nothing_found(
    place: Path, classes: Sequence[str], left_out: Counter[str], labelled: bool, hint: str
) -> InputError:
    """Describe a folder without pictures, or without folders for them."""
    there = f"; there are: {_counted(left_out)}" if left_out else ""
    what, expected = "no pictures", "files"
    if labelled:
        what = "no pictures in its class folders" if classes else "no class folders"
        expected = f"{place}/CLASS/PICTURE"
    proposed = f"; {hint}" if hint and left_out[_BESIDE] else ""
    wanted = " ".join(EXTENSIONS)
    return InputError(
        f"{place} has {what}{there}; expected {expected} with one of {wanted}{proposed}"
    )
