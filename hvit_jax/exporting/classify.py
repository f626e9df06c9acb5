"""Classify pictures with an exported model; stands in the `run.py` of every export."""

from __future__ import annotations

import argparse
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np

from hvit_jax.data.picture import open_picture
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.errors import InputError
from hvit_jax.pictures import Preprocessing

ABOUT = "Classify pictures, or their pixels, with the exported model beside this file."
AT_ONCE, SHOWN = 32, 5


def checked(folder, name, about):
    """Find a file, and compare it with its checksum."""
    path, wanted = folder / name, about["files"][name]
    whole = path.stat().st_size == wanted["bytes"]
    if not whole or zlib.crc32(np.memmap(path, mode="r").data) != wanted["crc32"]:
        raise InputError(f"{name} is damaged: it is not the file that was written; export again")
    return path


def classify(about, model, paths):
    """Prepare pictures and classify them, a batch at a time; yield each path and its logits."""
    size = about["batch"] or min(AT_ONCE, len(paths))
    for start in range(0, len(paths), size):
        part = paths[start : start + size]
        pixels = np.zeros((size, *about["input"]["resolution"], 3), np.uint8)
        for row, path in enumerate(part):
            pixels[row] = prepared(path, about)
        yield from zip(part, np.asarray(model(pixels))[: len(part)], strict=True)


def prepared(path, about):
    """Read a picture, upright as viewers show it, and cut it to the model's size."""
    image = open_picture(Path(path), str(path), exif=True)
    preprocessing = Preprocessing(**about["input"]["preprocessing"])
    return resize_and_crop(image, tuple(about["input"]["resolution"]), preprocessing)


def describe(logits, classes):
    """Name the classes of largest probability, or of most pixels of a map.

    A model without a head gives features, one of depth a map of metres.
    """
    if logits.ndim == 3 and not classes:
        return f"{logits.min():.4g} to {logits.max():.4g} m"
    if logits.ndim == 3:
        pixels = np.bincount(logits.argmax(-1).reshape(-1), minlength=len(classes))
        most = [i for i in np.argsort(-pixels)[:SHOWN] if pixels[i]]
        return ", ".join(f"{classes[i]} {100 * pixels[i] / pixels.sum():.1f} %" for i in most)
    if not classes:
        return " ".join(f"{value:.4g}" for value in logits[:SHOWN]) + " ..."
    shares = np.exp(logits - logits.max())
    shares = 100 * shares / shares.sum()
    return ", ".join(f"{classes[i]} {shares[i]:.1f} %" for i in np.argsort(-shares)[:SHOWN])


def main(load, words):
    """Classify the pictures that a command line names, by what `load` gives."""
    parser = argparse.ArgumentParser(prog="run.py", description=ABOUT)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a file that Pillow reads")
    pictures = parser.parse_args(words).pictures
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Such as of odd EXIF.
    about, model = load()
    for path, logits in classify(about, model, pictures):
        print(f"{path}: {describe(logits, about['classes'])}")


def run(load):
    """Do what the command line says; an error ends it in one line."""
    try:
        main(load, sys.argv[1:])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"run.py: {str(error) or type(error).__name__}")
