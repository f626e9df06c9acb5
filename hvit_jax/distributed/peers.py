"""The other processes of a run: notice that one has stopped or died, instead of waiting for it.

JAX leaves a process that waits for a dead one in the dark for minutes, and what it prints then is a
stack trace. Here every process leaves a sign of life in the coordinator's key-value store, and a
reason before it stops; a thread of every other process looks at both.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from hvit_jax.system.run import one_line

LOST = 1  # Exit status.
_FOLDER = "hvit_jax/peers/"
_BEATS = 8  # signs of life within the time limit, at least


class Peers:
    """Watches the other processes, and ends this one where one of them is gone.

    Attributes:
        index: of this process.
        ending: held while a result is being written; the process is not ended meanwhile.
        on_lost: called before this process is ended, to save what there is; or None.
    """

    def __init__(self, store: Any, index: int, count: int, *, seconds: float, program: str):
        """Begin to watch.

        Args:
            store: JAX's distributed client.
            index: of this process.
            count: of all processes.
            seconds: without a sign of life after which a process counts as dead.
            program: the name that messages start with.
        """
        self.index, self.ending, self.on_lost = index, threading.RLock(), None
        self._store, self._program = store, program
        self._seconds, self._done, self._beats = seconds, False, 0
        self._pause = min(1.0, seconds / _BEATS)
        now = time.monotonic()
        self._seen = {other: ("", now) for other in range(count) if other != index}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def saves(self, save: Callable[[], None] | None) -> None:
        """Name what saves the results so far where another process is lost; None for nothing."""
        with self.ending:
            self.on_lost = save

    def tell(self, reason: str) -> None:
        """Tell the others why this process stops, and leave them the time to read it."""
        self._done = True
        try:
            self._store.key_value_set(f"{_FOLDER}stopped/{self.index}", one_line(reason))
        except Exception:  # The coordinator is gone, and the others know that already.
            return
        if self.index == 0:
            time.sleep(3 * self._pause)  # The store is in this process.

    def wait_for_verdict(self) -> None:
        """Wait for the thread to find out who is lost, and to end this process; or return."""
        self._stopped.wait(2 * self._seconds)

    def done(self) -> None:
        """Let the others come and go from now on; signs of life go on until `close`."""
        self._done = True

    def close(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause):
            verdict = self._look()
            if verdict is not None and not self._done:
                self._end(verdict)

    def _look(self) -> str | None:
        """Leave a sign of life; say what happened to another process, if anything did."""
        now = time.monotonic()
        try:
            self._beats += 1
            alive = f"{_FOLDER}alive/{self.index}"
            self._store.key_value_set(alive, str(self._beats), allow_overwrite=True)
            found = dict(self._store.key_value_dir_get(_FOLDER))
        except Exception:  # jaxlib names no class; the time limit decides.
            found = {}
        for other, (before, since) in self._seen.items():
            reason = found.get(f"{_FOLDER}stopped/{other}")
            if reason is not None:
                return f"process {other} has stopped: {reason}"
            beat = found.get(f"{_FOLDER}alive/{other}", before)
            if beat != before:
                self._seen[other] = beat, now
            elif now - since > self._seconds:
                silent = f"no sign of life for {self._seconds:g} seconds"
                return f"process {other} has died or cannot be reached ({silent})"
        return None

    def _end(self, verdict: str) -> None:
        """Save what there is, say why, and end this process whatever its other threads wait for."""
        with self.ending:
            try:
                if self.on_lost is not None:
                    self.on_lost()
            finally:
                self.tell(verdict)
                print(f"{self._program}: {one_line(verdict)}", file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(LOST)


class NoPeers:
    """Stands for `Peers` in a run of one process."""

    def __init__(self):
        self.index, self.ending = 0, threading.RLock()

    def saves(self, save: Callable[[], None] | None) -> None:
        """Do nothing: no other process can be lost."""

    def done(self) -> None:
        """Do nothing."""
