"""Golden checkpoints of other libraries, found through HVIT_BACKBONE_GOLDENS."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from hvit_jax.commands.flags import parse
from hvit_jax.convert import convert_file
from hvit_jax.convert.config import READING, ConvertConfig

ROOT = Path(os.environ.get("HVIT_BACKBONE_GOLDENS") or Path(__file__).parent / "backbones")


@dataclass(frozen=True)
class Backbone:
    """One golden folder: a checkpoint's files, `about.json`, and what its library computes."""

    folder: Path

    @cached_property
    def about(self):
        return json.loads((self.folder / "about.json").read_text())

    @cached_property
    def expected(self):
        return np.load(self.folder / "expected.npz")

    @property
    def places(self):
        """Names of the resolutions: "native" and others."""
        return list(dict.fromkeys(key.split("/")[0] for key in self.expected.files))

    def images(self, place):
        """The batch of a resolution, (B, H, W, 3)."""
        return jnp.asarray(self.expected[f"{place}/inputs"].transpose(0, 2, 3, 1))

    @property
    def source(self):
        """What is converted: the folder, or its file where it has no config.json."""
        files = self.about["files"]
        bare = not any(file.endswith("config.json") for file in files)
        return self.folder / files[0] if bare else self.folder

    def convert(self, destination):
        """Convert it as the command would, and describe what became of it."""
        words = [str(self.source), str(destination), *self.about["options"]]
        config = parse(ConvertConfig, words, "hvit convert")
        options = {name: getattr(config, name) for name in READING}
        return convert_file(self.source, destination, **options)


BACKBONES = [Backbone(path.parent) for path in sorted(ROOT.glob("*/expected.npz"))]
