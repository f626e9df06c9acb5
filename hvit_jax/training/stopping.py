"""A stop between two steps: asked for by a signal, and found by all processes at the same point."""

from __future__ import annotations

import collections
import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.distributed.placement import Placement
from hvit_jax.system.signals import Stopped

_LATE = 2


class StopRequest:
    """Whether to stop; in several processes, whether any of them was asked to.

    There, the answer is two questions late, so that asking never waits for a device to be idle, and
    every process has to ask equally often.

    Attributes:
        exception: says how to stop.
    """

    def __init__(self, placement: Placement):
        """Begin without a request; `placement` has the devices of all processes."""
        self.exception: type[KeyboardInterrupt] = KeyboardInterrupt
        self._placement, self._wanted, self._found = placement, False, False
        self._any = jax.jit(jnp.any, out_shardings=placement.replicated)
        self._asked: collections.deque[jax.Array] = collections.deque()

    def is_set(self) -> bool:
        """Tell whether to stop."""
        if self._placement.processes == 1:
            return self._wanted
        rows = self._placement.devices // self._placement.processes
        self._asked.append(self._any(self._placement.shard_batch(np.full(rows, self._wanted))))
        if len(self._asked) > _LATE and self._asked.popleft():
            self._found = True
        return self._found

    def on_signal(self, number: int, frame: Any) -> None:
        """Note a signal; a second one does not wait for the end of the step."""
        self.exception = Stopped if number == signal.SIGTERM else KeyboardInterrupt
        if self._wanted:
            raise self.exception
        self._wanted = True


@contextlib.contextmanager
def stop_requests(placement: Placement) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request: between two steps the state is whole."""
    stop = StopRequest(placement)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, stop.on_signal) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
