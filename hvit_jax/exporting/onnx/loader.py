"""Classify pictures with the exported model beside this file: python run.py PICTURE ...

Needs onnxruntime, numpy and pillow, and nothing of the package that exported the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime

from hvit_jax.errors import InputError
from hvit_jax.exporting.classify import checked, run

FOLDER = Path(__file__).parent


def load(folder=FOLDER):
    """Give what export.json says, and a function from uint8 pictures (B, H, W, 3) to logits."""
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    file = checked(folder, about["program"], about)
    if about["weights"]:
        checked(folder, about["weights"]["file"], about)
    try:
        session = onnxruntime.InferenceSession(
            file, providers=onnxruntime.get_available_providers()
        )
    except Exception as error:
        reader = f"ONNX Runtime {onnxruntime.__version__}"
        raise InputError(f"{reader} cannot read the model: {error}") from error
    return about, lambda pixels: session.run(None, {"pixels": pixels})[0]


if __name__ == "__main__":
    run(load)
