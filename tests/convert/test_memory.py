"""Conversion of files larger than memory: arrays pass one at a time."""

import dataclasses
import functools
import sys
import weakref

import numpy as np
import pytest
from rich.progress import Progress
from safetensors.numpy import save_file

from hvit_jax.convert.detect import detect
from hvit_jax.convert.reader import read_state_dict
from hvit_jax.convert.switches import Stated
from hvit_jax.convert.tasks import fill_parameters
from hvit_jax.models.parameters import flatten
from tests.backbone_states import timm_state
from tests.scale_setup import run_python

WATCHED = """
import re, sys, threading, time
import jax
jax.config.update("jax_platforms", "cpu")
from hvit_jax.convert import convert_file

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

before, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
convert_file(sys.argv[1], sys.argv[2])
print((peak - before) // 1024)
"""


def test_one_array_of_a_file_is_in_memory_at_a_time(tmp_path):
    save_file(timm_state(depth=3), tmp_path / "in.safetensors")
    silent = Progress(disable=True)
    read = read_state_dict(tmp_path / "in.safetensors", silent)
    alive, most = set(), 0

    def watched(key):
        nonlocal most
        array = read.numbers[key]()
        alive.add(key)
        most = max(most, len(alive))
        weakref.finalize(array, alive.discard, key)
        return array

    numbers = {key: functools.partial(watched, key) for key in read.numbers}
    watching = dataclasses.replace(read, numbers=numbers)
    found = detect(watching, Stated({"heads": 2}), silent)
    (tmp_path / "mapped").mkdir()
    tree = fill_parameters(watching, found, tmp_path / "mapped")
    assert most <= 2 and not alive
    assert all(isinstance(leaf, np.memmap) for leaf in flatten(tree).values())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_does_not_grow_with_the_file(tmp_path):
    """The file has 0.6 GB in float32; what is mapped from files can be dropped at any time."""
    state = timm_state(width=1024, mlp=4096, depth=12, patch=16)
    state = {key: array.astype(np.float16) for key, array in state.items()}
    save_file(state, tmp_path / "in.safetensors")
    del state
    done = run_python(WATCHED, str(tmp_path / "in.safetensors"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300  # megabytes
