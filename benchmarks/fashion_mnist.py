"""Unpack Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) into class folders of PNG files.

`python benchmarks/fashion_mnist.py OUT` reads the files of Debian's package
`dataset-fashion-mnist` and writes OUT/train (60,000 pictures) and OUT/val (10,000).
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from hvit_jax.errors import InputError
from hvit_jax.system.files import new_folder
from hvit_jax.system.run import run

CLASSES = (
    "0-t-shirt",
    "1-trouser",
    "2-pullover",
    "3-dress",
    "4-coat",
    "5-sandal",
    "6-shirt",
    "7-sneaker",
    "8-bag",
    "9-ankle-boot",
)
SPLITS = {"train": "train", "val": "t10k"}
_DESCRIPTION = "Unpack Fashion-MNIST into class folders of PNG files: OUT/train and OUT/val."
DEBIAN = "/usr/share/datasets/fashion-mnist"


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of bytes.

    Args:
        path: such as train-images-idx3-ubyte.gz.

    Returns:
        Uint8 array, (count, 28, 28) for pictures, (count,) for labels.

    Raises:
        InputError: if the file is missing or is not of that kind.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InputError(
            f"cannot read {path}: {error}; Debian's package dataset-fashion-mnist has it"
        ) from error
    axes = data[3] if len(data) > 4 and data[:3] == b"\0\0\x08" else 0
    sizes = np.frombuffer(data, ">u4", axes, 4).tolist() if axes else []
    if not axes or len(data) != 4 + 4 * axes + int(np.prod(sizes)):
        raise InputError(f"{path} is not a whole IDX file of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(sizes)


def write_folder(pixels: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write pictures as grey PNG files, one folder a class, named by their index.

    Args:
        pixels: uint8 array (count, 28, 28).
        labels: uint8 array (count,), indices into `CLASSES`.
        folder: where to; its class folders are made.
    """
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in track(range(len(labels)), description=folder.name):
        picture = Image.fromarray(pixels[index])
        picture.save(folder / CLASSES[labels[index]] / f"{index:05d}.png", optimize=True)


def unpack(source: Path, output: Path, first: int | None = None) -> None:
    """Unpack both splits into a new folder, which appears whole or not at all.

    Args:
        source: the folder of the four IDX files.
        output: the folder to make.
        first: take only so many pictures of each split.

    Raises:
        InputError: if a file is missing or damaged, or the folder exists or cannot be written.
    """
    with new_folder(output) as temporary:
        for split, prefix in SPLITS.items():
            pixels = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
            labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
            write_folder(pixels[:first], labels[:first], temporary / split)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=_DESCRIPTION)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    source = f"folder of the four IDX files (default: {DEBIAN})"
    parser.add_argument("--source", type=Path, metavar="DIR", default=Path(DEBIAN), help=source)
    first = "only the first N pictures of each split"
    parser.add_argument("--first", type=int, metavar="N", help=first)
    options = parser.parse_args(arguments)
    return run(lambda: unpack(options.source, options.out, options.first), "fashion_mnist.py")


if __name__ == "__main__":
    sys.exit(main())
