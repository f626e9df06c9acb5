"""Several processes on this machine: the results of one, each picture once, and no hanging."""

import argparse
import contextlib
import functools
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from hvit_jax import distributed
from hvit_jax.distributed.processes import add_process_options, find_processes
from hvit_jax.distributed.runtime_log import _FATAL, relay
from hvit_jax.errors import InputError
from hvit_jax.evaluation.loop import BatchSharding
from tests.evaluation_setup import make_checkpoint, make_pictures, results_of
from tests.scale_setup import EVALUATE, TRAIN, finish, run_processes, started
from tests.training_setup import RECIPE, SIZES, column, make_data, parameters, train

WORDS = ("--method", "evit", "--drop-locations", "1", "--on-error", "skip", "-b", "4", "-j", "0")
QUICK = ("--process-timeout", "4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """13 pictures, of which two cannot be read."""
    damaged = ("c0/000.png", "c6/006.png")
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=13, damaged=damaged)


def test_three_processes_score_as_one_does(checkpoint, pictures, tmp_path):
    one, rows = results_of(pictures, checkpoint, tmp_path, *WORDS)
    files = tmp_path / "three.json", tmp_path / "three.npz"
    command = (pictures, "--checkpoint", checkpoint, *WORDS)
    written = ("--output", files[0], "--predictions", files[1])
    done = run_processes(EVALUATE, 3, *command, *written)
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    assert ["top-1" in each.stdout for each in done] == [True, False, False]
    three, others = json.loads(files[0].read_text()), np.load(files[1])
    # 4 is no multiple of 3; of 13 pictures in batches of 6, the last batch has one.
    assert (three["devices"], three["processes"], three["batch_size"]) == (3, 3, 6)
    assert three["images"] == 11 and three["skipped"] == one["skipped"]
    for name in ("top1", "top5", "not_finite", "report", "partial"):
        assert three[name] == one[name]
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-6)
    for name in ("paths", "labels", "top1"):
        np.testing.assert_array_equal(others[name], rows[name])
    np.testing.assert_allclose(others["logits"], rows["logits"], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More pictures than are scored in the time of a test: links to one."""
    folder = make_pictures(tmp_path_factory.mktemp("many"), count=1)
    for index in range(1, 20000):
        os.symlink(folder / "c0" / "000.png", folder / f"c{index % 7}" / f"{index:05d}.png")
    return folder


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other(many, checkpoint, tmp_path, lost):
    output = tmp_path / "results.json"
    command = (many, "--checkpoint", checkpoint, "-b", "2", "-j", "0", *QUICK, "--output", output)
    with started(EVALUATE, 2, *command) as processes:
        next(line for line in processes[0].stderr if line.startswith("compiled"))
        time.sleep(2)
        processes[lost].kill()
        killed = time.monotonic()
        done = finish(processes[1 - lost])
    assert time.monotonic() - killed < 30
    assert done.returncode not in (0, -signal.SIGKILL), done.stdout
    assert f"process {lost} has died or cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr and "stack trace" not in done.stderr
    if lost:
        results = json.loads(output.read_text())
        assert results["partial"] is True and 0 < results["images"] < 20000


def test_a_stopped_process_tells_the_other_why(many, checkpoint, tmp_path):
    output = tmp_path / "results.json"
    command = (many, "--checkpoint", checkpoint, "-b", "2", "-j", "0", *QUICK, "--output", output)
    with started(EVALUATE, 2, *command, slurm=True) as processes:
        next(line for line in processes[0].stderr if line.startswith("compiled"))
        time.sleep(1)
        processes[1].send_signal(signal.SIGTERM)
        done = [finish(process) for process in processes]
    assert [each.returncode for each in done] == [1, 128 + signal.SIGTERM]
    assert "process 1 has stopped: interrupted" in done[0].stderr
    assert json.loads(output.read_text())["partial"] is True


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["10 pictures", {"data_sha256": "1", "unroll": False}], None),
        (["9 pictures", {"data_sha256": "1", "unroll": False}], "started otherwise: 9 pictures;"),
        (["10 pictures", {"data_sha256": "2", "unroll": True}], "another data_sha256, unroll than"),
    ],
)
def test_processes_have_to_agree(monkeypatch, other, message):
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, other])
    problem = contextlib.nullcontext() if message is None else pytest.raises(InputError)
    with problem as found:
        distributed.check_agreement("10 pictures", data_sha256="1", unroll=False)
    if found is not None:
        assert str(found.value).startswith("process 1 ") and message in str(found.value)


def test_shares_hold_each_picture_once():
    for pictures, size, processes in ((13, 6, 3), (1, 4, 4), (8, 8, 2), (5, 2, 1)):
        parts = [BatchSharding(pictures, size, process, processes) for process in range(processes)]
        assert sorted(index for part in parts for index in part.indices) == list(range(pictures))
        assert all(len(part.indices) <= part.batches * part.rows for part in parts)
    assert BatchSharding(13, 6, 1, 3).indices == (2, 3, 8, 9)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # A batch script, outside srun.
        ({"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://1.2.3.4:5", "OMPI_COMM_WORLD_SIZE": "3"}, True),
        ({"KUBERNETES_SERVICE_HOST": "1.2.3.4"}, False),
    ],
)
def test_launchers_are_detected(environment, found):
    assert (find_processes(_options(), environment) is not None) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--processes 2", "go together"),
        ("--coordinator a:1 --processes 2 --process-id 2", "--process-id must be 0 to 1"),
        ("--coordinator a --processes 2 --process-id 0", "takes HOST:PORT"),
        ("--process-timeout 0", "--process-timeout must be 1 to 86400 seconds, got 0"),
    ],
)
def test_wrong_flags_are_named(words, message):
    with pytest.raises(InputError, match=message):
        find_processes(_options(words), {})


def _options(words=""):
    parser = argparse.ArgumentParser()
    add_process_options(parser)
    return parser.parse_args(words.split())


STOPPED = """
import os, signal
from hvit_jax.training import run
whole = run.training_batches
def stopped(*arguments, process, **options):
    for index, batch in enumerate(whole(*arguments, process=process, **options)):
        if index == 1 + process:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
run.training_batches = stopped
"""
OPTIONS = "--accumulate 2 --ema 0.9 -b 12 --epochs 3".split()
OPTIONS += "--val-every 1 --log-every 1 --save-every 2 -j 0".split()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training"), validation=5)


@pytest.mark.slow  # A minute or two: several processes start, and train together.
def test_two_processes_train_as_one_does_and_resume(training, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(training, one, *OPTIONS) == 0
    command = (training, "--output", two, *SIZES, *RECIPE, *OPTIONS, "--shard-parameters")
    # Both get the signal of a scheduler, at different times.
    with started(STOPPED + TRAIN, 2, *command) as processes:
        done = [finish(process) for process in processes]
    # The one that gets it later may stop with the other before it does.
    codes = {each.returncode for each in done}
    assert 143 in codes and codes <= {130, 143}, [each.stderr for each in done]
    assert not (two / "checkpoint").exists()
    done = run_processes(TRAIN, 2, *command, "--resume")
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "wrote" in done[0].stdout and "wrote" not in done[1].stdout
    assert "on 2 x cpu" in done[0].stdout
    assert column(two, "step") == column(one, "step")
    for name, file in (("loss", "metrics"), ("loss", "validation"), ("top1", "validation")):
        np.testing.assert_allclose(column(two, name, file), column(one, name, file), rtol=1e-4)
    # Keys' biases have no gradient, and Adam makes steps of its rounding.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=5e-4)
    jax.tree.map(close, parameters(two), parameters(one))


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (b"absl::Status: UNAVAILABLE\n", b"x: process 0 has died or cannot be reached\n"),
        (b"RPC: /xla/RegisterTask\n", b"x: the processes did not find each other in time\n"),
    ],
)
def test_pages_of_the_runtime_become_a_line(more, line):
    trouble = b"E1124 13:36:36.25 5353 coordination_service_agent.cc:289] Polled an error\n"
    fatal = b"F1124 13:36:36.25 5353 client.h:80] " + _FATAL + b". This most likely\n"
    for messages, expected in (
        (b"a warning\n" + trouble + fatal + more + b"    @ 0x7f\n", b"a warning\n" + line),
        (b"a warning\n" + trouble, b"a warning\n" + trouble),
    ):
        assert b"".join(relay(messages.splitlines(keepends=True), "x")) == expected
