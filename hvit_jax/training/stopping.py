"""A stop between two steps: asked for by a signal, and found by all processes at the same point."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hvit_jax.system.signals import Stopped


class StopRequest:
    """Whether to stop, which all processes find at the same point; `exception` says how."""

    def __init__(self, agree: Callable[[bool], bool]):
        """Begin without a request; `agree` tells all processes whether any has one."""
        self.agree, self.wanted, self.agreed = agree, False, False
        self.exception = KeyboardInterrupt

    def is_set(self) -> bool:
        """Tell whether a process wanted to stop."""
        self.agreed = self.agreed or self.agree(self.wanted)
        return self.agreed


@contextlib.contextmanager
def stop_requests(agree: Callable[[bool], bool]) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request: between two steps the state is whole.

    A second signal does not wait for the end of the step.
    """
    stop = StopRequest(agree)
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        stop.exception = Stopped if number == signal.SIGTERM else KeyboardInterrupt
        if stop.wanted:
            raise stop.exception
        stop.wanted = True

    previous = [signal.signal(number, handle) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
