"""Ctrl-C and SIGTERM, neither lost nor allowed to tear a library's work apart."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hvit_jax.system.library_messages import is_late_event


class Stopped(KeyboardInterrupt):
    """SIGTERM, as an exception like the one that Ctrl-C raises."""


@contextlib.contextmanager
def handling(handler: Callable[[int, Any], object], *numbers: int) -> Iterator[None]:
    """Let a function handle signals; outside the main thread, which alone can, nothing is done."""
    main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers if main}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def loading(program: str) -> Iterator[None]:
    """Let Ctrl-C end the process at once, in one line, while libraries load, which may lose it."""

    def end(number: int, frame: Any) -> None:
        os.write(2, f"{program}: interrupted\n".encode())
        os._exit(128 + number)

    # A shell's background commands ignore it, and go on doing so.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with contextlib.nullcontext() if ignored else handling(end, signal.SIGINT):
        yield


@contextlib.contextmanager
def sigterm_raises() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM into `Stopped` inside the context; only a main thread can.

    Yields:
        A function to call now and then, which raises `Stopped` again if a library lost it.
    """
    asked: list[int] = []

    def check() -> None:
        if asked:
            raise Stopped("stopped by SIGTERM")

    def stop(number, frame):
        asked.append(number)
        check()

    with unmasked(), handling(stop, signal.SIGTERM):
        yield check


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done, which must not end halfway."""
    held: list[int] = []
    with handling(lambda number, _: held.append(number), signal.SIGINT, signal.SIGTERM):
        yield
    for number in held:
        signal.raise_signal(number)


@contextlib.contextmanager
def unmasked() -> Iterator[None]:
    """Raise Ctrl-C and SIGTERM themselves, where C code made a SystemError of them.

    `system.run.run` and `sigterm_raises` do so at their ends; who catches them further inside needs
    it there.
    """
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise error.__cause__ from None
        raise


@contextlib.contextmanager
def insistent() -> Iterator[None]:
    """Raise a Ctrl-C or SIGTERM again that Python ignored, as it does in JAX's gc callback.

    What TensorStore says to an event loop of Orbax's that has failed already is not printed.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            handled = callable(signal.getsignal(signal.SIGTERM))
            again = handled and issubclass(unraisable.exc_type, Stopped)
            number = signal.SIGTERM if again else signal.SIGINT
            threading.Timer(0.05, signal.pthread_kill, [main, number]).start()
        elif not is_late_event(unraisable.exc_value):
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous
