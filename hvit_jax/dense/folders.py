"""Pictures with a map each: the folders of known data sets, and plain pairs of folders."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from PIL import Image

from hvit_jax.data.folder import EXTENSIONS, SPLITS, TRAIN
from hvit_jax.data.picture import PictureError, open_picture
from hvit_jax.dense.metrics import IGNORED
from hvit_jax.errors import InputError

# The ids of Cityscapes' files `labelIds` that are classes, in the order of the classes.
_CITYSCAPES = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
_INDEXED = ("1", "L", "P", "I", "I;16")  # Pillow's names of pictures with one number a pixel.
_NAMED = 5  # values, in a message


@dataclass(frozen=True)
class Labels:
    """Truth in classes: PNGs whose pixels, or palette indices, are read as they are.

    Attributes:
        values: the label of every value from 0 to 255; none: the value itself.
    """

    values: tuple[int, ...] = ()
    ends: tuple[str, ...] = (".png",)

    def read(self, path: Path, name: str) -> Int[np.ndarray, "H W"]:
        """Read the labels of one picture.

        Raises:
            PictureError: if the file cannot be read, or is a picture in colour.
        """
        wanted = "truth has one number a pixel, the class, in grey or as index of a palette"
        labels = _numbers(path, name, wanted).astype(np.int32)
        if not self.values:
            return labels
        values = np.array(self.values, np.int32)
        return np.where(labels < len(values), values[labels.clip(0, len(values) - 1)], labels)

    def check(self, labels: Int[np.ndarray, "H W"], name: str, outputs: int) -> None:
        """Refuse labels of no class.

        Raises:
            PictureError: with the values.
        """
        found = np.unique(labels)
        wrong = found[((found < 0) | (found >= outputs)) & (found != IGNORED)]
        if wrong.size:
            shown = ", ".join(map(str, wrong[:_NAMED])) + (", ..." if wrong.size > _NAMED else "")
            raise PictureError(
                f"truth {name} has the label{'s' * (wrong.size > 1)} {shown}; the model's classes "
                f"are 0 to {outputs - 1}, and {IGNORED} is ignored"
            )


@dataclass(frozen=True)
class Depths:
    """True depth in metres: PNGs of 16 bits, or NumPy's files of metres; 0 where it is not known.

    Attributes:
        scale: metres of one step in a PNG.
    """

    scale: float = 0.001
    ends: tuple[str, ...] = (".png", ".npy")

    def read(self, path: Path, name: str) -> Float[np.ndarray, "H W"]:
        """Read the depth of one picture.

        Raises:
            PictureError: if the file cannot be read, or is a picture in colour.
        """
        if path.suffix == ".npy":
            try:
                depth = np.load(path, allow_pickle=False).astype(np.float32)
            except (OSError, ValueError, EOFError) as error:
                raise PictureError(f"truth {name}: {error}") from error
            if depth.ndim != 2:
                raise PictureError(f"truth {name} has the shape {depth.shape}, not (height, width)")
            return np.nan_to_num(depth, nan=0.0, posinf=0.0, neginf=0.0)
        steps = _numbers(path, name, "depth is grey, of 16 bits")
        return steps.astype(np.float32) * np.float32(self.scale)


def _numbers(path: Path, name: str, wanted: str) -> Shaped[np.ndarray, "H W"]:
    """Read a picture of one number a pixel; `wanted` says what it should be if it has more."""
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"truth {name}: {reason}") from error
    if image.mode not in _INDEXED:
        raise PictureError(f"truth {name} is a picture in {image.mode}; {wanted}")
    return np.asarray(image)


@dataclass(frozen=True)
class Scenes:
    """Pictures, with a map each.

    Attributes:
        root: the folder that was named.
        paths: the pictures, relative to it, in sorted order.
        truths: the files of the truth, relative to it or absolute; empty for pictures without any.
        kind: how these are read.
        dataset: the layout that was found.
        outputs: classes of the data set; None: as many as the model has.
        exif: whether pictures are turned as their EXIF data says.
    """

    root: Path
    paths: tuple[str, ...]
    truths: tuple[str, ...]
    kind: Labels | Depths
    dataset: str = "folders"
    outputs: int | None = None
    exif: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def refuse_other_classes(self, outputs: int, checkpoint: Path) -> None:
        """Refuse a decoder that tells another number of classes apart than the data set has.

        Raises:
            InputError: that names both.
        """
        if self.outputs not in (None, outputs):
            raise InputError(
                f"{self.dataset} has {self.outputs} classes, the decoder of {checkpoint} {outputs}"
            )

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB; see `data.picture.open_picture`."""
        name = self.paths[index]
        return open_picture(self.root / name, name, exif=self.exif)

    def truth(self, index: int, size: tuple[int, int], outputs: int) -> np.ndarray | None:
        """Read what is true of one picture; None for pictures without truth.

        Args:
            index: which picture.
            size: its height and width.
            outputs: classes of the model.

        Raises:
            PictureError: if it cannot be read, has another size, or labels of no class.
        """
        if not self.truths:
            return None
        name = self.truths[index]
        truth = self.kind.read(self.root / name, name)
        if truth.shape != size:
            (rows, columns), (height, width) = truth.shape, size
            raise PictureError(
                f"truth {name} is of {rows} x {columns} pixels, its picture {self.paths[index]} of "
                f"{height} x {width}"
            )
        if isinstance(self.kind, Labels):
            self.kind.check(truth, name, outputs)
        return truth

    def sha256(self) -> str:
        """Name them by names and sizes in bytes of all files, and how truth is read."""
        digest = hashlib.sha256(repr(self.kind).encode())
        for path in (*self.paths, *self.truths):
            size = os.stat(self.root / path).st_size
            digest.update(f"{path}\0{size}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Name them as results do."""
        return {"dataset": self.dataset, "data_sha256": self.sha256()}


def _ade20k(root: Path, split: str) -> Scenes:
    name = {"val": "validation", "train": "training"}[split]
    pictures = _files(root, Path("images", name), (".jpg",))
    truths = [f"annotations/{name}/{Path(path).stem}.png" for path in pictures]
    labels = Labels(_without_zero())
    return Scenes(root, tuple(pictures), tuple(truths), labels, "ade20k", 150)


def _cityscapes(root: Path, split: str) -> Scenes:
    end = "_leftImg8bit.png"
    pictures = _files(root, Path("leftImg8bit", split), (end,))
    bases = [
        f"gtFine/{split}/{Path(path).parent.name}/{Path(path).name.removesuffix(end)}"
        for path in pictures
    ]
    trained = f"{bases[0]}_gtFine_labelTrainIds.png"
    kind = "labelTrainIds" if (root / trained).is_file() else "labelIds"
    values = [IGNORED] * 256
    for label, value in enumerate(_CITYSCAPES):
        values[value] = label
    labels = Labels(tuple(values) if kind == "labelIds" else ())
    truths = tuple(f"{base}_gtFine_{kind}.png" for base in bases)
    return Scenes(root, tuple(pictures), truths, labels, "cityscapes", 19)


def _pascal_context(root: Path, split: str) -> Scenes:
    listed = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
    try:
        names = sorted(listed.read_text(encoding="utf-8").split())
    except OSError as error:
        raise InputError(f"cannot read {listed}: {error.strerror}") from error
    if not names:
        raise InputError(f"{listed} names no pictures")
    pictures = tuple(f"JPEGImages/{name}.jpg" for name in names)
    truths = tuple(f"SegmentationClassContext/{name}.png" for name in names)
    return Scenes(root, pictures, truths, Labels(), "pascal_context", 60)


def _without_zero() -> tuple[int, ...]:
    """Map 0 to what is ignored, and others to one less; 255 stays."""
    return (IGNORED, *range(254), IGNORED)


@dataclass(frozen=True)
class _Layout:
    """A known data set: how it is read, by which folders it is known, and where these may lie."""

    read: Callable[[Path, str], Scenes]
    folders: tuple[str, ...]
    below: tuple[str, ...]

    def root(self, data: Path) -> Path | None:
        """Find the folder that holds it; None if there is none."""
        for root in (data, *(data / name for name in self.below)):
            if all((root / name).is_dir() for name in self.folders):
                return root
        return None


LAYOUTS = {
    "ade20k": _Layout(_ade20k, ("images", "annotations"), ("ADEChallengeData2016",)),
    "cityscapes": _Layout(_cityscapes, ("leftImg8bit", "gtFine"), ("cityscapes",)),
    "pascal_context": _Layout(
        _pascal_context,
        ("JPEGImages", "SegmentationClassContext"),
        ("VOC2010", "VOCdevkit/VOC2010"),
    ),
}
DATASETS = (*LAYOUTS, "folders")
NONE = "none"  # What stands for the truth of pictures without any.


def open_scenes(
    data: str | Path,
    dataset: str | None = None,
    truth: str | None = None,
    *,
    split: str = "val",
    reduce_zero_label: bool = False,
    depth_scale: float | None = None,
    exif: bool = False,
) -> Scenes:
    """List pictures and their truth.

    Args:
        data: the folder of a known data set; one that holds `images` and `labels` (or `depth`); or
            one of pictures, where `truth` names another.
        dataset: one of `DATASETS`; None: what the folder looks like.
        truth: a folder of truth, whose files have the pictures' names; "none": there is none.
        split: "val" or "train".
        reduce_zero_label: in plain folders, whether 0 is ignored and 1 the first class.
        depth_scale: metres of one step in a PNG, of depth; None: labels are wanted.
        exif: turn pictures as their EXIF data says, when they are opened.

    Raises:
        InputError: if there is no such folder, no pictures are in it, two of them differ in the
            ends of their names alone, or truth is missing.
    """
    root = Path(data)
    if not root.is_dir():
        raise InputError(f"{data} is not a folder" if root.exists() else f"{data} does not exist")
    if depth_scale is not None:
        kind = Depths(depth_scale)
    else:
        kind = Labels(_without_zero() if reduce_zero_label else ())
    found = {name: layout.root(root) for name, layout in LAYOUTS.items()}
    if dataset is None:
        known = [name for name in found if found[name] and truth is None and depth_scale is None]
        dataset = known[0] if known else "folders"
    if dataset == "folders":
        scenes = _plain(root, kind, truth, split)
    else:
        layout, place = LAYOUTS[dataset], found[dataset]
        if place is None:
            raise InputError(
                f"{data} holds no {dataset}: it has no folders {' and '.join(layout.folders)}"
            )
        scenes = layout.read(place, split)
    _refuse_missing(scenes)
    _refuse_twins(scenes)
    return dataclasses.replace(scenes, exif=exif)


def _plain(root: Path, kind: Labels | Depths, truth: str | None, split: str) -> Scenes:
    """List plain folders: `images` and `labels` (or `depth`), or two that were named."""
    own = "labels" if isinstance(kind, Labels) else "depth"
    if truth is None and not ((root / "images").is_dir() and (root / own).is_dir()):
        raise InputError(
            f"{root} holds neither a data set that is known ({', '.join(LAYOUTS)}) nor folders "
            f"images and {own}; name the folder of the truth with --truth DIR, or give --truth none"
        )
    pictures = root if truth is not None else root / "images"
    truths = Path(truth).absolute() if truth not in (None, NONE) else pictures.parent / own
    if truth not in (None, NONE) and not truths.is_dir():
        raise InputError(f"--truth {truth} is not a folder")
    part = _split_below(pictures, split)
    names = _files(pictures, Path(part), EXTENSIONS)
    paths = tuple(os.path.relpath(pictures / name, root) for name in names)
    if truth == NONE:
        return Scenes(root, paths, (), kind)
    if part and not (truths / part).is_dir():
        names = [os.path.relpath(name, part) for name in names]
    files = tuple(_beside(truths, name, kind.ends) for name in names)
    inside = truths.is_relative_to(root)
    named = tuple(os.path.relpath(file, root) if inside else str(file) for file in files)
    return Scenes(root, paths, named, kind)


def _split_below(folder: Path, split: str) -> str:
    """Find the folder of a split among those in a folder; "" if none of them is one."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    wanted = TRAIN if split == "train" else SPLITS
    return next((name for each in wanted for name in names if name.lower() == each), "")


def _beside(folder: Path, picture: str, ends: Sequence[str]) -> Path:
    """Find the truth of a picture's name; the first that may exist where none does."""
    places = [folder / Path(picture).with_suffix(end) for end in ends]
    return next((place for place in places if place.is_file()), places[0])


def _files(root: Path, below: Path, ends: Sequence[str]) -> list[str]:
    """List pictures below a folder, relative to `root`.

    Raises:
        InputError: if there is no such folder, or there are none in it.
    """
    folder = root / below
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist")
    found = [
        path.relative_to(root).as_posix()
        for path in folder.rglob("*")
        if path.name.lower().endswith(tuple(end.lower() for end in ends))
        and not path.name.startswith(".")
    ]
    if not found:
        raise InputError(f"no pictures in {folder} (names that end in {', '.join(ends)})")
    return sorted(found)


def _refuse_missing(scenes: Scenes) -> None:
    for paths, what in ((scenes.paths, "pictures"), (scenes.truths, "files of truth")):
        missing = [path for path in paths if not (scenes.root / path).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(paths)} {what} are missing, such as "
                f"{scenes.root / missing[0]}"
            )


def _refuse_twins(scenes: Scenes) -> None:
    """Refuse pictures whose names differ in their ends alone: truth and maps go by the rest."""
    seen: dict[str, str] = {}
    for path in scenes.paths:
        other = seen.setdefault(os.path.splitext(path)[0], path)
        if other != path:
            raise InputError(
                f"{other} and {path} in {scenes.root} would share their truth and their map; "
                "rename one of them"
            )
