"""Ending early: Ctrl-C and SIGTERM keep what was scored so far."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(KeyboardInterrupt):
    """SIGTERM, as an exception like the one that Ctrl-C raises."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """Give the exit status that shells expect: 128 and the signal's number."""
    return 128 + (signal.SIGTERM if isinstance(stop, Stopped) else signal.SIGINT)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into `Stopped` inside the context; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame):
        raise Stopped("stopped by SIGTERM")

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
