"""Classify pictures with the exported model beside this file: python run.py PICTURE ...

Needs jax, flatbuffers, numpy and pillow, and nothing of the package that exported the model.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
from jax import export

from hvit_jax.errors import InputError
from hvit_jax.exporting.classify import checked, run

FOLDER = Path(__file__).parent


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


if __name__ == "__main__":
    run(load)
