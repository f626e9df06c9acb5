"""How every command ends: one clear line for a user's mistake, never a traceback."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, cast

from hvit_jax.errors import InputError, first_line
from hvit_jax.system.library_messages import (
    ignore_warnings_of_pillow,
    is_out_of_memory,
    without_messages_of_orbax,
)
from hvit_jax.system.signals import Stopped, insistent, unmasked

_USAGE_ERROR, _BROKEN_PIPE = 2, 141
_INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)


def run(main: Callable[[], int | None], program: str) -> int:
    """Run a command; its failures become one line on stderr and an exit status.

    Args:
        main: the command; returns an exit status, None for 0.
        program: the name that the line starts with, such as "hvit convert".

    Returns:
        What `main` returns; 2 after a user's mistake, an error of the operating system or out of
        memory, 130 after Ctrl-C, 143 after SIGTERM, 141 if the reader of the output has gone. Other
        exceptions are defects and pass.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    ignore_warnings_of_pillow()
    try:
        with unmasked(), insistent(), without_messages_of_orbax():
            status = main()
        print(end="", flush=True)  # There may be no stdout, as under some daemons.
        return status or 0
    except BrokenPipeError:
        # Python flushes stdout once more on its way out; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):
            return _BROKEN_PIPE  # Rich ends the program where nobody reads what it prints.
        raise
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Stopped) else signal.SIGINT
        return _complain(program, str(error) or "interrupted", 128 + number)
    except InputError as error:
        return _complain(program, str(error), _USAGE_ERROR)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _complain(program, f"{where}{error.strerror or error}", _USAGE_ERROR)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _complain(program, f"out of memory: {first_line(error)}", _USAGE_ERROR)


def leave(status: int) -> NoReturn:
    """End the process: after Ctrl-C or SIGTERM at once, else as Python does it.

    What was interrupted may have been a wait for XLA, whose threads go on compiling. In order, the
    process would wait for them, and then crash, as they use what it has freed.
    """
    if status in _INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A second one ends it here, without a word.
        # The one part of Python's exit that matters beyond the process: workers and semaphores.
        if helpers := cast(Any, sys.modules.get("multiprocessing.util")):  # Loaded with them.
            helpers._exit_function()
        leave_at_once(status)
    sys.exit(status)


def leave_at_once(status: int) -> NoReturn:
    """End the process without waiting for threads, or for other processes."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):  # Ctrl-C ends the reader too, as of `| tee log`.
            print(end="", file=stream, flush=True)
    os._exit(status)


def _complain(program: str, message: str, status: int) -> int:
    print(f"{program}: {one_line(message)}", file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """Join a message's lines, and escape what a terminal would act on."""
    joined = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)
