"""Where pictures come from: what every source offers, and how a command line names one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from PIL import Image

from hvit_jax.data.folder import read_folder
from hvit_jax.data.tfds import PREFIX, read_tfds


@runtime_checkable
class Source(Protocol):
    """Labelled pictures with random access; it can be pickled, so that other processes may read it.

    Attributes:
        paths: names of the pictures, sorted.
        labels: the class of every picture, an index into `classes`.
        classes: names of the classes.
    """

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

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Decode one picture to RGB.

        Raises:
            PictureError: if it cannot be read or decoded.
        """
        ...


def open_source(name: str) -> Source:
    """Open what a command line calls DATA.

    Args:
        name: a folder of class folders, or `tfds:NAME[:SPLIT]`.

    Raises:
        InputError: if there is nothing of that name, or no pictures in it.
    """
    return read_tfds(name) if name.startswith(PREFIX) else read_folder(name)
