"""Where pictures come from: what every source offers, what a command line names, and part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from hvit_jax.data.folder import SPLITS, read_folder
from hvit_jax.data.tfds import PREFIX, read_tfds

# How `take_evenly` chooses, for files that name what numbers depend on: no chance, so no seed.
SAMPLING = "at even distances"


@runtime_checkable
class Source(Protocol):
    """Labelled pictures with random access, which can be pickled for other processes to read."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the pictures, sorted."""
        ...

    @property
    def labels(self) -> tuple[int, ...]:
        """The class of every picture, an index into `classes`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how they were read."""
        ...

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB.

        Raises:
            PictureError: if it cannot be read or decoded.
        """
        ...


def open_source(
    name: str,
    splits: tuple[str, ...] = SPLITS,
    *,
    exif: bool = False,
    labelled: bool | None = True,
    hint: str = "",
) -> Source:
    """Open what a command line calls DATA.

    Args:
        name: a folder of class folders, or `tfds:NAME[:SPLIT]`.
        splits: names of splits, the first that is there is read where `name` names none.
        exif: turn pictures as their EXIF data says.
        labelled: whether folders are classes; see `read_folder`.
        hint: what an error proposes where pictures lie in no class folder.

    Raises:
        InputError: if there is nothing of that name, or no pictures in it.
    """
    if name.startswith(PREFIX):
        return read_tfds(name, splits, exif=exif)
    return read_folder(name, splits, exif=exif, labelled=labelled, hint=hint)


@dataclass(frozen=True)
class Subset:
    """Some of a source's pictures, by ascending indices; a `Source` itself."""

    source: Source
    indices: tuple[int, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Names of the pictures."""
        return tuple(self.source.paths[index] for index in self.indices)

    @property
    def labels(self) -> tuple[int, ...]:
        """The class of every picture."""
        return tuple(self.source.labels[index] for index in self.indices)

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self.source.classes

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the whole source."""
        return self.source.notes

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB; see `Source.open`."""
        return self.source.open(self.indices[index])


def take_evenly(source: Source, count: int) -> Subset:
    """Take `count` pictures, or all, at even distances: neighbours are often of one class."""
    return Subset(source, even_places(count, len(source)))


def even_places(count: int, pictures: int) -> tuple[int, ...]:
    """Choose `count` places among pictures, or all, at even distances."""
    count = min(count, pictures)
    return tuple(place * pictures // count for place in range(count))
