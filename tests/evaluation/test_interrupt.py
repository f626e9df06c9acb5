"""Ctrl-C and SIGTERM: what was scored is reported and saved, workers end, no traceback."""

import json
import os
import signal
import time

import numpy as np
import pytest

from tests.evaluation_setup import CONFIG, make_checkpoint, make_pictures, start_process

PICTURES = 4000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Thousands of links to one picture."""
    folder = make_pictures(tmp_path_factory.mktemp("many"), count=1)
    for index in range(1, PICTURES):
        name = folder / f"c{index % CONFIG.num_classes}" / f"{index:05d}.png"
        os.symlink(folder / "c0" / "000.png", name)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def alive(pid):
    try:
        with open(f"/proc/{pid}/status") as file:
            return "State:\tZ" not in file.read()
    except OSError:
        return False


def children(process):
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(name)] if parent == process.pid else []
    return found


def wait_for_end(pids):
    deadline = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def wait_for_scoring(process):
    for line in process.stderr:
        if line.startswith("compiled"):
            time.sleep(1)
            return
    pytest.fail("the program has ended")


@pytest.mark.parametrize(
    ("number", "workers", "status"), [(signal.SIGINT, 1, 130), (signal.SIGTERM, 0, 143)]
)
def test_interrupt_saves_what_was_scored(many, checkpoint, tmp_path, number, workers, status):
    output, predictions = tmp_path / "r.json", tmp_path / "p.npz"
    words = ("-b", 1, "-j", workers, "--output", output, "--predictions", predictions)
    with start_process(many, "--checkpoint", checkpoint, *words) as process:
        wait_for_scoring(process)
        helpers = children(process)
        # To all processes at once, as a terminal does.
        os.killpg(process.pid, number) if workers else process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert "Traceback" not in err and "leaked" not in err
    results, found = json.loads(output.read_text()), np.load(predictions)
    assert results["partial"] is True and results["images"] < PICTURES
    assert workers or results["images"] > 0
    assert f"interrupted: {results['images']} of {PICTURES} pictures were scored" in out
    assert len(found["paths"]) == results["images"] == len(found["logits"])
    assert found["logits"].shape[1] == CONFIG.num_classes
    assert sorted(os.listdir(tmp_path)) == ["p.npz", "r.json", "r.json.progress"]
    assert bool(helpers) == bool(workers)
    wait_for_end(helpers)


def test_interrupt_during_compilation(many, checkpoint, tmp_path):
    words = ("-j", 0, "--output", tmp_path / "r.json")
    with start_process(many, "--checkpoint", checkpoint, *words) as process:
        next(line for line in process.stderr if f"{PICTURES} pictures" in line)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["partial"] is True and results["images"] < PICTURES
    assert "Traceback" not in err


def test_workers_end_with_a_killed_program(many, checkpoint):
    with start_process(many, "--checkpoint", checkpoint, "-b", 1, "-j", 1) as process:
        wait_for_scoring(process)
        helpers = children(process)
        process.kill()
        process.communicate(timeout=60)
    assert helpers
    wait_for_end(helpers)
