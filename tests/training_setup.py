"""Two classes of small pictures, a small recipe, and how to run the training command on them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from hvit_jax.checkpoint import load_parameters, read_description
from hvit_jax.commands.flags import parse
from hvit_jax.commands.train import PROGRAM
from hvit_jax.distributed.together import run_together
from hvit_jax.system.run import run
from hvit_jax.training import TrainConfig
from hvit_jax.training import train as run_training
from hvit_jax.training.data import training_batches

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


def command(words, **seams):
    """Run the command in this process, with replaced arguments of `hvit_jax.training.train`."""

    def main():
        config = parse(TrainConfig, [*map(str, words)], program=PROGRAM, description="")
        return run_together(lambda: run_training(config, **seams) and None, config.processes, "x")

    return run(main, PROGRAM)


def train(data, output, *arguments, **seams):
    """Run the command in this process, with the small recipe."""
    return command([data, "--output", output, *SIZES, *RECIPE, *arguments], **seams)


def before_batch(number, act):
    """Make training batches, and call a function before one of them."""

    def batches(*arguments, **options):
        for index, batch in enumerate(training_batches(*arguments, **options)):
            if index == number:
                act()
            yield batch

    return batches


def signals_before_batch(number, *signals):
    """Make training batches, and send this process signals before one of them."""
    return before_batch(number, lambda: [os.kill(os.getpid(), each) for each in signals])


TRAIN = """
import signal, sys
from tests.training_setup import *
batches = {batches}
sys.exit(command(sys.argv[1:], batches=batches))
"""


def train_elsewhere(data, output, *arguments, batches="training_batches", **environment):
    """Run the command in a process of its own.

    Args:
        batches: Python that makes the batches.
    """
    words = [str(data), "--output", str(output), *SIZES, *RECIPE, *map(str, arguments)]
    return subprocess.run(
        [sys.executable, "-c", TRAIN.format(batches=batches), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # As this process's tests.
        env={
            **os.environ,
            **{"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
            **environment,
        },
    )


def rows(output, name="metrics"):
    with (output / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def column(output, name, file="metrics"):
    return [float(row[name]) for row in rows(output, file)]


def parameters(output):
    directory = output / "checkpoint"
    return load_parameters(directory, read_description(directory).config)
