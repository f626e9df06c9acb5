"""Two classes of small pictures, a small recipe, and how to run the training command on them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hvit_jax.checkpoint import load_parameters, read_description
from hvit_jax.commands.train import main

ROOT = Path(__file__).parents[1]
SIZES = "--patch-size 4 --depth 2 --width 16 --heads 2 --mlp-width 32 -r 16".split()
RECIPE = "--epochs 6 -b 8 --warmup-epochs 0.5 --log-every 2 --save-every 100 --seed 3".split()


def make_data(root, classes=("dark", "light"), validation=0):
    """Classes that differ in brightness: 12 pictures each, and some of another seed to validate."""
    for split, seed, count in (("train", 0, 12), ("val", 1, validation)):
        random = np.random.default_rng(seed)
        for index, name in enumerate(classes if count else ()):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100, (20, 18, 3), np.uint8) + 150 * index
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


def train(data, output, *arguments):
    """Run the command in this process, with the small recipe."""
    return main([str(data), "--output", str(output), *SIZES, *RECIPE, *map(str, arguments)])


def train_elsewhere(data, output, *arguments, before="", **environment):
    """Run the command in a process of its own.

    Args:
        before: Python to run first in it.
    """
    code = f"import sys\n{before}\nfrom hvit_jax.commands.train import main\nsys.exit(main())"
    words = [str(data), "--output", str(output), *SIZES, *RECIPE, *map(str, arguments)]
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


def rows(output, name="metrics"):
    with (output / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def column(output, name, file="metrics"):
    return [float(row[name]) for row in rows(output, file)]


def parameters(output):
    directory = output / "checkpoint"
    return load_parameters(directory, read_description(directory).config)
