"""A tiny checkpoint and pictures for it, and how to run the command line on them."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import hvit_jax
from hvit_jax.checkpoint import TRAINED, Description, save_checkpoint
from hvit_jax.commands.eval import PROGRAM, main
from hvit_jax.commands.flags import parse
from hvit_jax.evaluation.run import EvalConfig, Seams
from hvit_jax.evaluation.run import evaluate as evaluate_config
from hvit_jax.models.parameters import init_parameters
from hvit_jax.pictures import Preprocessing
from hvit_jax.system.run import run

ROOT = Path(__file__).parents[1]
CONFIG = hvit_jax.ViTConfig(
    (16, 24), patch_size=8, depth=3, width=16, heads=2, mlp_width=32, num_classes=7
)


def make_checkpoint(
    directory, config=CONFIG, classes=(), preprocessing=Preprocessing(), trained=None
):
    """Args: trained: the method that it says it was trained with."""
    source = {}
    if trained is not None:
        reducer = trained.resolve(config)
        source = {"format": TRAINED, "method": reducer.name, "args": reducer.options()}
    description = Description(config, source, classes, preprocessing)
    save_checkpoint(directory, init_parameters(config, 0), description)
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


def evaluate(folder, checkpoint, *arguments, workers=0, **seams):
    """Run the command line in this process; returns its exit status.

    Args:
        seams: fields of `Seams`.
    """
    words = [folder, "--checkpoint", checkpoint, "-j", workers, *arguments]
    words = [str(word) for word in words]
    if not seams:
        return main(words)
    return run(
        lambda: not evaluate_config(parse(EvalConfig, words, PROGRAM), seams=Seams(**seams)),
        PROGRAM,
    )


def results_of(folder, checkpoint, output, *arguments, **options):
    """Run it and read its results and predictions."""
    files = ("--output", output / "results.json", "--predictions", output / "predictions.npz")
    status = evaluate(folder, checkpoint, *files, "--overwrite", *arguments, **options)
    assert status == 0
    return json.loads((output / "results.json").read_text()), np.load(output / "predictions.npz")


@contextlib.contextmanager
def no_room(size):
    """Let files grow no longer than so many bytes, as on a full disk; it stops root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    cached = "jax_persistent_cache_min_compile_time_secs"
    least = getattr(jax.config, cached)
    jax.config.update(cached, 1e9)  # The tests' compiled programs are to stay whole.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update(cached, least)


def stop_at(wanted, error, times=1):
    """Make an `on_stage` that raises an error when a stage is reached for the nth time."""
    left = times

    def on_stage(stage):
        nonlocal left
        left -= stage == wanted
        if left == 0 and stage == wanted:
            raise error

    return on_stage


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
