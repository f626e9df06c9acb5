"""Classify pictures with the exported model beside this file: python run.py PICTURE ...

Needs jax, flatbuffers, numpy and pillow, and nothing of the package that exported the model.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
from jax import export

from hvit_jax.config import Preprocessing
from hvit_jax.data.picture import open_picture
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.errors import InputError

ABOUT = "Classify pictures with the exported model beside this file."
FOLDER = Path(__file__).parent
AT_ONCE, SHOWN = 32, 5


def load(folder=FOLDER):
    """Give what export.json says, and a function from uint8 pictures (B, H, W, 3) to logits."""
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    platform = export.default_export_platform()
    if platform not in about["programs"]:
        has = ", ".join(about["programs"])
        raise InputError(f"the model is exported for {has}; this machine's platform is {platform}")
    file = checked(folder, about["programs"][platform], about)
    try:
        program = export.deserialize(bytearray(file.read_bytes()))
    except Exception as error:
        made = f"made with jax {about['versions']['jax']}, this is {jax.__version__}"
        raise InputError(f"jax cannot read the program ({made}): {error}") from error
    weights = load_weights(folder, about["weights"], about) if about["weights"] else {}
    return about, functools.partial(jax.jit(program.call), jax.device_put(weights))


def load_weights(folder, description, about):
    """Read the weights; NumPy has no bfloat16, so those are stored as uint16."""
    with np.load(checked(folder, description["file"], about)) as arrays:
        return {name: arrays[name].view(dtype) for name, dtype in description["dtypes"].items()}


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
    """Name the classes of largest probability; a model without a head gives features."""
    if not classes:
        return " ".join(f"{value:.4g}" for value in logits[:SHOWN]) + " ..."
    shares = np.exp(logits - logits.max())
    shares = 100 * shares / shares.sum()
    return ", ".join(f"{classes[i]} {shares[i]:.1f} %" for i in np.argsort(-shares)[:SHOWN])


def main(folder, words):
    """Classify the pictures that a command line names."""
    parser = argparse.ArgumentParser(prog="run.py", description=ABOUT)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a file that Pillow reads")
    pictures = parser.parse_args(words).pictures
    warnings.filterwarnings("ignore", module=r"PIL\.")  # Such as of odd EXIF.
    about, model = load(folder)
    for path, logits in classify(about, model, pictures):
        print(f"{path}: {describe(logits, about['classes'])}")


if __name__ == "__main__":
    try:
        main(FOLDER, sys.argv[1:])
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"run.py: {str(error) or type(error).__name__}")
