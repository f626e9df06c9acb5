"""The golden folder: numbers from the original code, found through HVIT_GOLDENS."""

import json
import os
from collections import ChainMap
from functools import cached_property
from pathlib import Path

import jax
import numpy as np


class Goldens:
    """Reads the folder that HVIT_GOLDENS names; see DESIGN.md for its layout.

    By default it reads the two beside the tests: the newer methods' numbers lie in one of their
    own, for the same checkpoint and pictures.
    """

    def __init__(self):
        named, ours = os.environ.get("HVIT_GOLDENS"), Path(__file__).parent / "goldens"
        self.folders = [Path(named)] if named else [ours, ours / "methods"]
        self.folder = self.folders[0]
        descriptions = [json.loads((each / "models.json").read_text()) for each in self.folders]
        self.size = descriptions[0]["size"]
        self.configs = ChainMap(*(each["configs"] for each in descriptions))

    def _arrays(self, name):
        paths = [each / name for each in self.folders]
        return ChainMap(*(np.load(path) for path in paths if path.exists()))

    @cached_property
    def models(self):
        return self._arrays("models.npz")

    @cached_property
    def ops(self):
        return self._arrays("ops.npz")

    @cached_property
    def preprocess(self):
        return self._arrays("preprocess.npz")

    def images(self, config):
        """The batch of a configuration, (B, H, W, 3)."""
        inputs = np.load(self.folder / "inputs.npy")
        return inputs[self.configs[config]["inputs"]].transpose(0, 2, 3, 1)

    def cases(self, prefix):
        """Names of the operation cases that start with a prefix."""
        names = {key.split("/")[0] for key in self.ops}
        return sorted(name for name in names if name.startswith(prefix))

    def case(self, name):
        """All fields of one operation case."""
        keys = [key for key in self.ops if key.split("/")[0] == name]
        return {key.split("/")[1]: self.ops[key] for key in keys}

    def draws(self, config, like):
        """Shape the recorded draws of a configuration like those that the method would make."""
        return recorded_draws(self.models, config, like)


def recorded_draws(arrays, config, like):
    """Shape the draws of a configuration in an archive like those that the method would make."""
    names = sorted(key for key in arrays if key.startswith(f"{config}/draw_"))
    recorded = iter([arrays[name] for name in names])
    shaped = tuple(
        jax.tree.map(lambda leaf: np.reshape(next(recorded), leaf.shape), entry) for entry in like
    )
    assert next(recorded, None) is None, "the original drew more numbers than the method does"
    return shaped


def method_args(args):
    """Translate golden arguments to this project's: ToMe's r may be {"r", "inflection"}."""
    r = args.get("r")
    return {**args, "r": (r["r"], float(r["inflection"]))} if isinstance(r, dict) else args
