"""Signals that libraries lose or turn into something else."""

import subprocess
import sys

import pytest

from hvit_jax.system.run import run
from hvit_jax.system.signals import Stopped, sigterm_raises, unmasked


def test_a_signal_that_c_code_made_a_system_error_of_is_raised_itself():
    with pytest.raises(Stopped, match="by SIGTERM"), unmasked():
        masked()


def masked():
    try:
        raise Stopped("stopped by SIGTERM")
    except Stopped as error:
        raise SystemError("returned a result with an exception set") from error


def test_every_command_ends_as_by_the_signal(capsys):
    assert run(masked, "hvit eval") == 143
    assert capsys.readouterr().err == "hvit eval: stopped by SIGTERM\n"
    with pytest.raises(Stopped), sigterm_raises():
        masked()


def test_other_system_errors_pass():
    with pytest.raises(SystemError, match="of another kind"), unmasked():
        raise SystemError("of another kind")


# Compiles for seconds. Ctrl-C comes meanwhile, at which jaxlib stops waiting for its thread.
COMPILING = """
import multiprocessing, signal, threading
import jax, jax.numpy as jnp
from hvit_jax.system.run import leave, run

held = multiprocessing.get_context("spawn").Lock()  # As workers have them.

def deep(x):
    for _ in range(150):
        x = jnp.sort(jnp.sin(x @ x), axis=0)
    return x

def main():
    program = jax.jit(deep).lower(jnp.ones((8, 8)))
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    print("begun")
    program.compile()
    print("compiled")

leave(run(main, "x"))
"""


def test_what_still_compiles_does_not_crash_the_end():
    words = [sys.executable, "-c", COMPILING]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "begun\n", "x: interrupted\n")
