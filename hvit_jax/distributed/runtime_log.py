"""One line for the pages that JAX's runtime prints where the coordinator of a run is lost.

The runtime ends a process that loses process 0 at once, from C++, with a stack trace; nothing in
Python can come before it. So in runs of several processes its messages, but not Python's, go
through a small program that outlives the process by a moment: this file, run as a script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

_TROUBLE = re.compile(rb"^[EWF]\d{4} .*(coordination_service|client\.h)")
_GONE = "process 0 has died or cannot be reached"
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"


def shorten_runtime_messages(program: str) -> None:
    """Send what is written to file descriptor 2, `sys.stderr` excepted, through the filter.

    Args:
        program: the name that its line starts with.
    """
    terminal = os.dup(2)
    reader, writer = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, program],
        stdin=reader,
        stderr=terminal,
        start_new_session=True,  # Ctrl-C is not meant for it.
    )
    os.close(reader)
    sys.stderr.flush()
    sys.stderr = open(terminal, "w", buffering=1, errors="backslashreplace")
    os.dup2(writer, 2)
    os.close(writer)


def relay(messages: Iterable[bytes], program: str) -> Iterator[bytes]:
    """Pass lines on; from the first sign of trouble on, wait for what it comes to.

    Args:
        messages: the runtime's.
        program: the name that a line of this function's own starts with.
    """
    held = []
    for line in messages:
        if held or _TROUBLE.match(line):
            held.append(line)
        else:
            yield line
    if any(_FATAL in line for line in held):
        # A process other than 0 is missed by hvit_jax.distributed.peers first.
        meeting = any(b"/RegisterTask" in line for line in held)
        why = "the processes did not find each other in time" if meeting else _GONE
        held = [f"{program}: {why}\n".encode()]
    yield from held


if __name__ == "__main__":
    for passed in relay(sys.stdin.buffer, sys.argv[1]):
        sys.stderr.buffer.write(passed)
        sys.stderr.buffer.flush()
