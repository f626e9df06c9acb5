"""A tiny checkpoint and pictures for it, and how to run the command line on them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import hvit_jax
from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.commands.eval import main
from hvit_jax.models.parameters import init_parameters

ROOT = Path(__file__).parents[1]
CONFIG = hvit_jax.ViTConfig(
    (16, 24), patch_size=8, depth=3, width=16, heads=2, mlp_width=32, num_classes=7
)


def make_checkpoint(directory, config=CONFIG, classes=()):
    save_checkpoint(directory, init_parameters(config, 0), Description(config, {}, classes))
    return directory


def make_pictures(folder, count=10, classes=CONFIG.num_classes, damaged=()):
    """Noise in class folders c0, c1, ...; numbers run through the classes in turn.

    Args:
        damaged: those that cannot be read.
    """
    random = np.random.default_rng(0)
    for index in range(classes):
        (folder / f"c{index}").mkdir(parents=True)
    for index in range(count):
        pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"c{index % classes}" / f"{index:03d}.png")
    for name in damaged:
        (folder / name).write_bytes(b"no picture")
    return folder


def evaluate(folder, checkpoint, *arguments, workers=0):
    """Run the command line in this process."""
    words = [folder, "--checkpoint", checkpoint, "-j", workers, *arguments]
    return main([str(word) for word in words])


def results_of(folder, checkpoint, output, *arguments, **options):
    """Run it and read its results and predictions."""
    files = ("--output", output / "results.json", "--predictions", output / "predictions.npz")
    status = evaluate(folder, checkpoint, *files, "--overwrite", *arguments, **options)
    assert status == 0
    return json.loads((output / "results.json").read_text()), np.load(output / "predictions.npz")


def start_process(*arguments):
    """Run `python eval.py` from another folder and in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.sep,
        start_new_session=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
