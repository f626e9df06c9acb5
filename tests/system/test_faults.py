"""`kill -9` at random moments, in a bounded loop; minutes, so `pytest -m slow` runs it.

`HVIT_KILLS=20` sets how often each command is killed (default: 4).
"""

import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import hvit_jax
from hvit_jax.checkpoint import load_parameters, read_description
from hvit_jax.models.parameters import flatten
from tests.evaluation_setup import make_checkpoint, make_pictures
from tests.torch_files import swag_state

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("HVIT_KILLS", "4"))
LIMIT = 300
MANY = 3000
WHOLE, KILLED = "whole.json", "killed.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_checkpoint(folder / "checkpoint")
    make_pictures(folder / "pictures", count=28)
    make_pictures(folder / "data" / "train", count=28)
    torch.save(swag_state(), folder / "in.torch")
    _make_many(folder / "many")
    return folder


def _make_many(folder):
    """Links to a few pictures, and one that cannot be read."""
    make_pictures(folder, count=14)
    for index in range(14, MANY):
        os.symlink(folder / f"c{index % 7}" / f"{index % 14:03d}.png", _name(folder, index))
    _name(folder, MANY - 1).unlink()
    _name(folder, MANY - 1).write_bytes(b"no picture")


def _name(folder, index):
    return folder / f"c{index % 7}" / f"{index:05d}.png"


def start(words, cwd):
    command = [sys.executable, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **quiet)


def finish(words, cwd):
    """Run to the end; returns how long it took."""
    started = time.monotonic()
    process = start(words, cwd)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    return time.monotonic() - started


def kill_again_and_again(words, resumed, cwd, seconds, after_kill, begin=lambda process: None):
    """Kill the command at random moments, check what is left, and let it finish at last.

    Args:
        seconds: how long after `begin` to kill it, at most.
        begin: called with the process; returns when the time to kill it begins.
    """
    chance = random.Random(0)
    for _ in range(KILLS):
        process = start(resumed() or words, cwd)
        begin(process)
        try:
            process.wait(chance.uniform(0.1, 0.95) * seconds)
            _check(process.returncode, process.stderr.read())
            return
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        after_kill()
    process = start(resumed() or words, cwd)
    _, errors = process.communicate(timeout=LIMIT)
    _check(process.returncode, errors)


def _check(status, errors):
    """Done, now or already before the last kill."""
    assert status == 0 or "exists already" in errors, errors


def whole_json(path):
    """Files of results are whole, or not there."""
    if path.exists():
        json.loads(path.read_text())


def test_train(inputs, tmp_path):
    def words(output):
        sizes = "--patch-size 8 --depth 2 --width 16 --heads 2 --mlp-width 32 -r 16".split()
        recipe = "--epochs 8 -b 4 --save-every 3 --log-every 1 --ema 0.9 --method evit".split()
        return ["-m", "hvit_jax", "train", inputs / "data", "--output", output, *sizes, *recipe]

    seconds = finish(words("whole"), tmp_path)
    saved = tmp_path / "killed" / "settings.json"
    kill_again_and_again(
        words("killed"),
        lambda: [*words("killed"), "--resume"] if saved.exists() else None,
        tmp_path,
        seconds,
        lambda: whole_json(saved),
    )
    losses = []
    for name in ("whole", "killed"):
        with (tmp_path / name / "metrics.csv").open() as file:
            losses.append([(row["step"], row["loss"]) for row in csv.DictReader(file)])
    assert losses[0] == losses[1] and len(losses[0]) == 56
    trees = [
        flatten(load_parameters(folder, read_description(folder).config))
        for folder in (tmp_path / name / "checkpoint" for name in ("whole", "killed"))
    ]
    assert all(np.array_equal(trees[0][name], trees[1][name]) for name in trees[0])


COMPARE = "-m hvit_jax compare --methods evit,tome --seconds 0.01 -j 0".split()
PROFILE = [ROOT / "profile.py", "--method", "tome", "--sweep", "batch=1,2,3"]


@pytest.mark.parametrize(("command", "key"), [(COMPARE, "scores"), (PROFILE, "gflops")])
def test_tables(inputs, tmp_path, command, key):
    """Rows hold times, which differ; which rows there are, and what was found, must not."""
    data = [inputs / "pictures"] if "compare" in command else []
    words = [*command, *data, "--checkpoint", inputs / "checkpoint", "--no-cache", "--output"]

    def found(path):
        rows = json.loads(path.read_text())["rows"]
        return [(row["method"], str(row["args"]), row["batch"], row[key]) for row in rows]

    seconds = finish([*words, WHOLE], tmp_path)
    killed = tmp_path / KILLED
    kill_again_and_again(
        [*words, killed],
        lambda: [*words, killed, "--resume"] if killed.exists() else None,
        tmp_path,
        seconds,
        lambda: whole_json(killed),
    )
    assert found(killed) == found(tmp_path / WHOLE)


def test_convert(inputs, tmp_path):
    """A folder is whole or not there, and what a killed run left is in no one's way."""

    def words(output):
        return ["-m", "convert", inputs / "in.torch", output, "--heads", "2"]

    def look():
        if (tmp_path / "killed").exists():
            hvit_jax.load(tmp_path / "killed")

    seconds = finish(words(tmp_path / "whole"), ROOT)
    for _ in range(KILLS):
        if not (tmp_path / "killed").exists():
            kill_again_and_again(
                words(tmp_path / "killed"), lambda: None, ROOT, seconds / KILLS, look
            )
    hvit_jax.load(tmp_path / "killed")


EVAL = """
import sys
from hvit_jax.commands.eval import PROGRAM
from hvit_jax.commands.flags import parse
from hvit_jax.evaluation.run import EvalConfig, Seams, evaluate
from hvit_jax.system.run import run
often = Seams(interval=0.05)
sys.exit(run(lambda: not evaluate(parse(EvalConfig, sys.argv[1:], PROGRAM), seams=often), PROGRAM))
"""


def test_eval(inputs, tmp_path):
    """Slow enough to be killed anywhere: batches of one picture, kept all the time."""

    def words(name, *more):
        files = ("--output", tmp_path / f"{name}.json", "--predictions", tmp_path / f"{name}.npz")
        data = (inputs / "many", "--checkpoint", inputs / "checkpoint")
        return ["-c", EVAL, *data, "-b", "1", "-j", "1", "--on-error", "skip", *files, *more]

    def look():
        whole_json(tmp_path / "killed.json")
        for path in (tmp_path / "killed.npz", *(tmp_path / "killed.json.progress").glob("*.npz")):
            if path.exists():
                np.load(path)["top1"]

    def parts():
        return len(list((tmp_path / "killed.json.progress").glob("*.npz")))

    def next_part(process):
        before = parts()
        while process.poll() is None and parts() <= before:
            time.sleep(0.01)

    finish(words("whole"), tmp_path)
    resumed = words("killed", "--resume")
    kill_again_and_again(resumed, lambda: None, tmp_path, 1.0, look, next_part)
    assert parts() == 0
    whole, again = (json.loads((tmp_path / name).read_text()) for name in (WHOLE, KILLED))
    for name in ("images_per_second", "input_wait", "compile_seconds"):
        assert whole.pop(name) and again.pop(name)
    assert whole.pop("config") != again.pop("config")  # They name other files.
    assert whole == again and whole["images"] == MANY - 1
    one, other = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "killed.npz")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    left = {path for path in os.listdir(tmp_path) if not path.startswith(".")}
    assert left == {"whole.json", "whole.npz", "killed.json", "killed.npz"}
