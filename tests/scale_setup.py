"""How to run commands with several devices, and in several processes, on this machine."""

import contextlib
import os
import socket
import subprocess
import sys

import numpy as np

from tests.evaluation_setup import ROOT

_FLAGS = os.environ.get("XLA_FLAGS", "")  # See conftest.py.
EIGHT = {"XLA_FLAGS": f"{_FLAGS} --xla_force_host_platform_device_count=8"}
EVALUATE = "import sys; from hvit_jax.commands.eval import main; sys.exit(main())"
# Runs a function `command` in several processes.
TOGETHER = """
import os, signal, sys, time
import jax
from hvit_jax.commands import flags
from hvit_jax.distributed.gathering import gather
from hvit_jax.distributed.processes import Processes
from hvit_jax.distributed.together import run_together
from hvit_jax.errors import InputError
from hvit_jax.system import library_messages as messages
COMMAND
processes = flags.parse(Processes, sys.argv[1:], program="x", description="")
sys.exit(run_together(command, processes, "x"))
"""
_SECONDS = 240  # Generous: a loaded machine compiles slowly.


def start_python(code, *words, **environment):
    """Start a program with arguments; matrix products as exact as in this process's tests."""
    exact = {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, **exact, "PYTHONPATH": str(ROOT), **environment},
    )


def finish(process):
    """Wait for a program; what it printed, and its status."""
    try:
        out, err = process.communicate(timeout=_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_python(code, *words, **environment):
    return finish(start_python(code, *words, **environment))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def slurm_task(index, count, port):
    """What srun tells a task, and the port that JAX would else take from the job's number."""
    task = {"PROCID": index, "LOCALID": index, "STEP_NUM_TASKS": count, "NTASKS": count}
    about = {"SLURM_" + name: str(value) for name, value in task.items()}
    names = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost"}
    return {**about, **names, "JAX_COORDINATOR_PORT": str(port)}


@contextlib.contextmanager
def started(code, count, *words, slurm=False, **environment):
    """Start `count` processes of one run, as a user or as SLURM does; none is left behind."""
    port, processes = free_port(), []
    try:
        for index in range(count):
            where = ("--coordinator", f"127.0.0.1:{port}", "--processes", count)
            flags = () if slurm else (*where, "--process-id", index)
            launcher = slurm_task(index, count, port) if slurm else {}
            processes.append(start_python(code, *words, *flags, **launcher, **environment))
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_command(command, count, *words):
    """Run the source of a function `command` in several processes."""
    return run_processes(TOGETHER.replace("COMMAND", command), count, *words)


def run_processes(code, count, *words, **environment):
    with started(code, count, *words, **environment) as processes:
        return [finish(process) for process in processes]


def assert_same_predictions(found, expected):
    """Compare two files of predictions, whose logits may differ by roundings."""
    for name in ("paths", "labels", "top1"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-5, atol=1e-6)
