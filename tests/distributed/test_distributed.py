"""Several processes on this machine: the results of one, each picture once, and no hanging."""

import contextlib
import json
import os
import signal
import time

import numpy as np
import pytest

from hvit_jax.commands import calibrate, compare, convert, export, flags, profile, visualize
from hvit_jax.distributed.gathering import check_same
from hvit_jax.distributed.processes import Processes, refuse_several
from hvit_jax.errors import InputError
from hvit_jax.evaluation.loop import BatchSharding
from tests.evaluation_setup import make_checkpoint, make_pictures, results_of
from tests.scale_setup import (
    EVALUATE,
    TOGETHER,
    assert_same_predictions,
    finish,
    free_port,
    run_command,
    run_processes,
    run_python,
    started,
)

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
    assert_same_predictions(others, rows)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More pictures than are scored in the time of a test: links to one."""
    folder = make_pictures(tmp_path_factory.mktemp("many"), count=1)
    for index in range(1, 20000):
        os.symlink(folder / "c0" / "000.png", folder / f"c{index % 7}" / f"{index:05d}.png")
    return folder


@contextlib.contextmanager
def scoring(many, checkpoint, *words, **options):
    """Two processes in the middle of an evaluation."""
    command = (many, "--checkpoint", checkpoint, "-b", "2", "-j", "0", *QUICK, *words)
    with started(EVALUATE, 2, *command, **options) as processes:
        next(line for line in processes[0].stderr if line.startswith("compiled"))
        time.sleep(1)
        yield processes


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other(many, checkpoint, lost):
    with scoring(many, checkpoint) as processes:
        processes[lost].kill()
        killed = time.monotonic()
        done = finish(processes[1 - lost])
    assert time.monotonic() - killed < 30
    assert done.returncode in (1, -signal.SIGABRT), done.stderr
    assert "hvit eval: another process has stopped or cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_process_ends_the_other(many, checkpoint, tmp_path):
    output = tmp_path / "results.json"
    with scoring(many, checkpoint, "--output", output, slurm=True) as processes:
        processes[1].send_signal(signal.SIGTERM)
        done = [finish(process) for process in processes]
    assert done[0].returncode in (1, -signal.SIGABRT)
    assert done[1].returncode == 128 + signal.SIGTERM
    assert "hvit eval: another process has stopped" in done[0].stderr


# A command that waits for nothing which would notice that the other process is gone.
WAITS = """
def command():
    if jax.process_index() == FAILING:
        FAULT
    time.sleep(SECONDS)
"""


def waits(failing, fault, seconds=100):
    names = {"FAILING": failing, "FAULT": fault, "SECONDS": seconds}
    command = WAITS
    for name, value in names.items():
        command = command.replace(name, str(value))
    return run_command(command, 2, *QUICK)


@pytest.mark.parametrize(
    ("failing", "fault", "status", "line"),
    [
        (1, "os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        (0, "raise InputError('7 is odd')", 2, "x: 7 is odd\n"),
        pytest.param(
            *(1, "raise InputError('7 is odd')", 2, "x: 7 is odd\n"), marks=pytest.mark.slow
        ),
        (1, "1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        (1, "return 130", 130, ""),
    ],
)
def test_nobody_waits_for_a_process_that_is_gone(failing, fault, status, line):
    began = time.monotonic()
    done = waits(failing, fault)
    assert time.monotonic() - began < 60
    gone, other = done[failing], done[1 - failing]
    assert gone.returncode == status and gone.stderr.endswith(line)
    # At the very beginning, JAX may be asking process 0 for something when that goes.
    noticed = failing == 0 and other.returncode == 1
    assert noticed or other.returncode == -signal.SIGABRT
    own, jaxs = "x: another process has stopped", "JAX distributed service detected fatal errors"
    assert (own if noticed else jaxs) in other.stderr and "Traceback" not in other.stderr


def test_a_status_is_passed_on_when_all_are_done():
    assert [each.returncode for each in waits(0, "return 1", seconds=1)] == [1, 0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (["10 pictures", {"data_sha256": "1", "unroll": False}], None),
        (
            ["9 pictures", {"data_sha256": "1", "unroll": False}],
            "started with other options: 9 pictures;",
        ),
        (["10 pictures", {"data_sha256": "2", "unroll": True}], "another data_sha256, unroll than"),
    ],
)
def test_processes_have_to_do_the_same(other, message):
    problem = contextlib.nullcontext() if message is None else pytest.raises(InputError)
    with problem as found:
        check_same("10 pictures", gather=lambda mine: [mine, other], data_sha256="1", unroll=False)
    if found is not None:
        assert str(found.value).startswith("process 1 ") and message in str(found.value)


def test_batches_are_divided_among_processes_without_overlap():
    for pictures, size, processes in ((13, 6, 3), (1, 4, 4), (8, 8, 2), (5, 2, 1)):
        parts = [BatchSharding(pictures, size, process, processes) for process in range(processes)]
        assert sorted(index for part in parts for index in part.indices) == list(range(pictures))
        assert all(len(part.indices) <= part.batches * part.rows for part in parts)
    assert BatchSharding(13, 6, 1, 3).indices == (2, 3, 8, 9)


SLURM = {"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_STEP_NUM_TASKS": "2"}
OPEN_MPI_4 = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://1.2.3.4:5", "OMPI_COMM_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # A batch script, outside srun.
        ({"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_TASKS": "1"}, False),
        (SLURM, True),
        (OPEN_MPI_4, True),
        ({"KUBERNETES_SERVICE_HOST": "1.2.3.4"}, False),
        # Under srun --mpi=pmi2 or pmix, which count the same processes.
        ({**SLURM, "PMI_SIZE": "2", "PMIX_RANK": "1"}, True),
        # One process has nobody to find.
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "PMIX_RANK": "0"}, False),
        ({"WORLD_SIZE": "1", "RANK": "0"}, False),
        ({"WORLD_SIZE": "4"}, False),  # Something else: torchrun sets RANK too.
        ({"PMI_SIZE": "many"}, False),
    ],
)
def test_launchers_are_detected(environment, found):
    assert Processes().several(environment) == found
    refused = pytest.raises(InputError, match="hvit compare runs in one process")
    with refused if found else contextlib.nullcontext():
        refuse_several("hvit compare", environment)


@pytest.mark.parametrize(
    "environment",
    [
        {"OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "0"},  # Open MPI 5.
        # mpirun in an allocation of SLURM, whose own processes run one a host.
        {"OMPI_COMM_WORLD_SIZE": "4", **SLURM},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"MPI_LOCALNRANKS": "2"},
        {"MV2_COMM_WORLD_SIZE": "2"},
        {"JSM_NAMESPACE_SIZE": "2"},
        {"FLUX_JOB_SIZE": "2"},
        {"PMIX_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    ],
)
def test_processes_that_do_not_find_each_other_are_refused(environment):
    name = next(iter(environment))
    with pytest.raises(InputError, match=f"^{name}={environment[name]} says.* --coordinator"):
        Processes().several(environment)
    with pytest.raises(InputError, match="hvit compare runs in one process"):
        refuse_several("hvit compare", environment)
    # What the user says wins.
    assert Processes("a:1", 2, 0).several(environment)
    assert not Processes("a:1", 1, 0).several(environment)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (calibrate, []),
        (compare, []),
        (convert, ["a.torch", "a.jax"]),
        (export, ["-o", "out"]),
        (profile, []),
        (visualize, ["a.png", "-o", "out.png"]),
    ],
)
def test_commands_of_one_process_refuse_launchers(command, words, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert command.main(words) == 2
    assert f"{command.PROGRAM} runs in one process, with all" in capsys.readouterr().err


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_processes_that_never_come_are_named_at_once_and_not_waited_for(index):
    where, began = f"127.0.0.1:{free_port()}", time.monotonic()
    words = ("--coordinator", where, "--processes", 3, "--process-id", index)
    done = run_python(TOGETHER.replace("COMMAND", "command = None"), *words, *QUICK)
    assert time.monotonic() - began < 30
    assert done.returncode == 2
    assert done.stderr == (
        f"x: waiting 4 s at most for all 3 processes to meet at {where}\n"
        f"x: waited 4 s for all 3 processes to meet at {where}; start them all, or raise "
        "--process-timeout\n"
    )


def test_a_launcher_that_says_too_little_is_named():
    done = run_python(TOGETHER.replace("COMMAND", "command = None"), *QUICK, **SLURM)
    assert done.stderr.endswith(
        "InputError: the processes did not find each other: coordinator_address should be defined; "
        "give each of them --coordinator HOST:PORT, --processes and --process-id\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--processes 2", "go together"),
        ("--coordinator a:1 --processes 2 --process-id 2", "--process-id must be 0 to 1"),
        ("--coordinator a --processes 2 --process-id 0", "takes HOST:PORT"),
        ("--process-timeout 0", "--process-timeout must be at least 1 and at most 86400, got 0"),
    ],
)
def test_wrong_flags_are_named(words, message):
    with pytest.raises(InputError, match=message):
        flags.parse(Processes, words.split(), program="hvit eval", description="")


def test_one_process_needs_no_others():
    words = "--coordinator a:1 --processes 1 --process-id 0".split()
    alone = flags.parse(Processes, words, program="hvit eval", description="")
    assert not alone.several({})
