"""What every command line does with mistakes, interruptions and vanished readers."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hvit_jax import InputError
from hvit_jax.system.run import one_line, run
from hvit_jax.system.signals import Stopped, insistent, sigterm_raises, uninterrupted

ROOT = Path(__file__).parents[2]


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, line",
    [
        (InputError("7 is odd"), 2, "tool: 7 is odd"),
        (InputError("7 is odd\n  and \x1b[1mbold\n"), 2, "tool: 7 is odd; and \\x1b[1mbold"),
        (FileNotFoundError(2, "No such file", "a.txt"), 2, "tool: a.txt: No such file"),
        (OSError("odd"), 2, "tool: odd"),
        (KeyboardInterrupt(), 130, "tool: interrupted"),
        (KeyboardInterrupt("stopped after 3"), 130, "tool: stopped after 3"),
    ],
)
def test_failures_become_one_line(capsys, error, status, line):
    assert run(raising(error), "tool") == status
    assert capsys.readouterr() == ("", line + "\n")


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0, "tool")


@pytest.mark.parametrize("returned, status", [(None, 0), (0, 0), (3, 3)])
def test_status_of_the_command_is_kept(returned, status):
    assert run(lambda: returned, "tool") == status


def test_one_line_keeps_other_alphabets_and_spaces():
    assert one_line("Größe  2\nœuvre") == "Größe  2; œuvre"


def script(text, *arguments):
    """Run a few lines that use the wrapper, in a process of their own."""
    head = "import os, sys; from hvit_jax.system.run import run\n"
    return [sys.executable, "-c", head + text, *arguments]


def test_reader_that_went_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = script("sys.exit(run(lambda: print('x' * 100000), 'tool'))")
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_no_stdout_is_no_error():
    command = script("sys.stdout = None; sys.exit(run(lambda: print('x'), 'tool'))")
    done = subprocess.run(command, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]
)
def test_uninterrupted_holds_signals_back(number, exception):
    steps, before = [], [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(exception), sigterm_raises():
        with uninterrupted():
            signal.raise_signal(number)
            steps.append("finished")
        steps.append("not reached")
    assert steps == ["finished"]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_uninterrupted_without_ctrl_c_and_in_threads_does_nothing():
    done = []

    def work():
        with uninterrupted():
            done.append(threading.current_thread().name)

    work()
    thread = threading.Thread(target=work, name="other")
    thread.start()
    thread.join()
    assert done == ["MainThread", "other"]


def test_a_sigterm_that_a_library_lost_is_raised_again():
    with sigterm_raises() as check:
        check()
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        with pytest.raises(Stopped):
            check()


@pytest.mark.parametrize(
    ("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Stopped)]
)
def test_a_signal_in_a_garbage_collection_is_not_lost(number, exception):
    def callback(phase, _):
        if phase == "start":
            gc.callbacks.remove(callback)
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt) as found, insistent(), sigterm_raises():
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(10)
    assert found.type is exception


def test_python_m_convert_from_the_root(tmp_path):
    command = [sys.executable, "-m", "convert", "nowhere.torch", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "hvit convert: nowhere.torch does not exist\n"


def test_ctrl_c_while_jax_is_imported():
    blocked = (
        "import builtins, runpy, sys, time\n"
        "real = builtins.__import__\n"
        "def slow(name, *rest, **options):\n"
        "    if name == 'jax':\n"
        "        print('importing', flush=True); time.sleep(60)\n"
        "    return real(name, *rest, **options)\n"
        "builtins.__import__ = slow\n"
        "runpy.run_module('convert', run_name='__main__', alter_sys=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", blocked],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "hvit convert: interrupted\n")
