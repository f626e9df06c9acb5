"""The texts of other libraries that are read, each provoked with the installed versions."""

import asyncio
import errno
import fractions
import os

import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.data.loader import WorkerLost
from hvit_jax.system import library_messages as messages
from tests.data.test_data import Dying, collect
from tests.scale_setup import run_command, run_python


def test_jax_runs_out_of_memory():
    with pytest.raises(RuntimeError) as found:
        jnp.zeros((1 << 50,), jnp.uint8).block_until_ready()
    assert messages.is_out_of_memory(found.value)
    assert not messages.is_out_of_memory(RuntimeError("odd"))


def test_pytorch_runs_out_of_memory():
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert messages.is_out_of_memory(found.value)


def test_numpy_runs_out_of_memory():
    with pytest.raises(MemoryError) as found:
        np.empty(1 << 55, np.uint8)
    assert messages.is_out_of_memory(found.value)


def test_pytorch_refuses_a_class(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(fractions.Fraction(1), tmp_path / "x")
    with pytest.raises(Exception) as found:
        torch.load(tmp_path / "x", weights_only=True)
    assert messages.refused_class(found.value) == "fractions.Fraction"
    assert messages.refused_class(ValueError("odd")) is None


def test_grain_loses_a_worker():
    with pytest.raises(WorkerLost) as found:
        collect(Dying(), batch_size=1, workers=1)
    assert messages.is_dead_worker(found.value.__cause__)
    assert not messages.is_dead_worker(RuntimeError("odd"))


def test_an_event_loop_is_closed():
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError) as found:
        loop.call_soon(print)
    assert messages.is_late_event(found.value) and not messages.is_late_event(RuntimeError("odd"))


FULL_DISK = """
import contextlib, resource, sys
from hvit_jax.system import library_messages as messages
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
quiet = messages.without_messages_of_orbax if QUIET else contextlib.nullcontext
with quiet():  # As in commands: before absl is imported, and around what does it again.
    import jax.numpy as jnp, orbax.checkpoint
    with quiet():
        pass
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        try:
            checkpointer.save(sys.argv[1], {"x": jnp.arange(100000.0)})
            checkpointer.wait_until_finished()
        except Exception as error:
            print(messages.why_failed(error))
"""


@pytest.mark.parametrize("quiet", [False, True])
def test_orbax_cannot_write(tmp_path, quiet):
    """It tells the system's reason as a number, and logs the same with tracebacks."""
    done = run_python(FULL_DISK.replace("QUIET", str(quiet)), tmp_path / "x")
    assert done.stdout == os.strerror(errno.EFBIG) + "\n"
    assert ("Traceback" in done.stderr) != quiet


def test_why_orbax_failed_where_no_number_tells():
    assert messages.why_failed(OSError(28, "No space left")) == "No space left"
    assert messages.why_failed(ValueError("odd\nand long")) == "ValueError: odd"


LOST = """
def command():
    gather(1)
    if jax.process_index() == 1:
        os._exit(7)
    try:
        gather(2)
    except Exception as error:
        print(messages.is_lost_connection(error), messages.is_lost_connection(OSError("odd")))
        raise
"""


def test_jax_loses_a_connection():
    done = run_command(LOST, 2, "--process-timeout", "4")
    assert done[0].stdout.endswith("True False\n") and done[0].returncode == 1
    assert "x: another process has stopped or cannot be reached (" in done[0].stderr
