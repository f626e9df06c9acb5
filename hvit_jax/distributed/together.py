"""Several processes as one run: how they meet, and how they end together.

A process ends if the others have not joined it within `--process-timeout`. Once they have met,
JAX's runtime watches them: one that has died, or left early, is missed after the same time, and the
runtime then ends the others, with messages of its own.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable

import jax

from hvit_jax.distributed.processes import HOW_TO_MEET, Processes
from hvit_jax.errors import InputError, first_line
from hvit_jax.system.library_messages import is_lost_connection
from hvit_jax.system.run import leave_at_once, run

_LOST = 1  # Exit status where another process is gone, or this one has a defect.
_ABSENT = 2  # Exit status where other processes never came.
_STOPPED = 128  # Exit statuses from here on mean a signal: the others are not done.
_MARGIN = 10  # Seconds by which JAX waits longer than this process does.


def run_together(
    command: Callable[[], int | None], processes: Processes, program: str
) -> int | None:
    """Run a command, as one of several processes where there are several.

    A process that fails, or is stopped, prints why and ends here at once. JAX's runtime then ends
    the others, which wait for it: at once where they notice a broken connection, else within the
    time-out.

    Args:
        command: what every process runs; returns an exit status, None for 0.
        processes: which of them this is.
        program: the name that messages start with.

    Returns:
        The command's status.
    """
    if not processes.several():
        return command()
    _meet(processes, program)
    done = False

    def finish() -> int | None:
        nonlocal done
        status = command()
        done = True
        return status

    try:
        status = run(finish, program)
    except Exception as error:  # A library names no class where a connection breaks.
        status = _LOST
        if is_lost_connection(error):
            why = f"another process has stopped or cannot be reached ({first_line(error)})"
            print(f"{program}: {why}", file=sys.stderr)
        else:
            traceback.print_exc()
    if not done or status >= _STOPPED:
        leave_at_once(status)  # Leaving in order would wait for the others.
    jax.distributed.shutdown()
    return status


def _meet(processes: Processes, program: str) -> None:
    """Wait for the others; where they do not come, this process ends with one line."""
    seconds, who = processes.process_timeout, "the other processes"
    if processes.coordinator is not None:
        who = f"all {processes.processes} processes to meet at {processes.coordinator}"
    print(f"{program}: waiting {seconds:g} s at most for {who}", file=sys.stderr, flush=True)

    def give_up() -> None:
        line = f"waited {seconds:g} s for {who}; start them all, or raise --process-timeout"
        print(f"{program}: {line}", file=sys.stderr, flush=True)
        os._exit(_ABSENT)

    # JAX would end this process as well, but with a stack of its own.
    alarm = threading.Timer(seconds, give_up)
    alarm.daemon = True
    alarm.start()
    # It would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.processes,
            processes.process_id,
            initialization_timeout=round(seconds) + _MARGIN,
            heartbeat_timeout_seconds=round(seconds),
        )
    except (RuntimeError, ValueError) as error:
        hint = "" if processes.coordinator else f"; {HOW_TO_MEET}"
        why = first_line(error).rstrip(".") + hint
        raise InputError(f"the processes did not find each other: {why}") from error
    finally:
        alarm.cancel()
