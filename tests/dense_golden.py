"""The golden folder of dense prediction: numbers from the original code, and its checkpoints."""

import json
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from hvit_jax.pictures import MEAN, STD

FOLDER = Path(os.environ.get("HVIT_DENSE_GOLDENS") or Path(__file__).parent / "dense" / "goldens")


class DenseGoldens:
    """Reads the folder that HVIT_DENSE_GOLDENS names; by default the copy beside the tests."""

    folder = FOLDER

    @cached_property
    def description(self):
        return json.loads((self.folder / "dense.json").read_text())

    @cached_property
    def heads(self):
        return json.loads((self.folder / "heads.json").read_text())

    @cached_property
    def arrays(self):
        return np.load(self.folder / "dense.npz")

    @cached_property
    def head_arrays(self):
        return np.load(self.folder / "heads.npz")

    def pixels(self, images):
        """The uint8 pictures (B, H, W, 3) that a configuration names."""
        stored = np.load(self.folder / "images.npz")
        return stored["square"][1:] if images == "square1" else stored[images]

    def images(self, config):
        """The batch of a configuration, normalised as its net wants it."""
        about = self.description["configs"][config]
        half = (np.float32([0.5] * 3),) * 2
        kind = self.description["nets"][about["net"]]["normalization"]
        mean, std = half if kind == "vit" else (np.float32(MEAN), np.float32(STD))
        pixels = self.pixels(about["images"]).astype(np.float32)
        return (pixels / np.float32(255) - mean) / std
