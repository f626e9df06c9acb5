"""Which kind of device a program is compiled for: this machine's, or the one it is exported to."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def backend() -> str:
    """Name the kind of device that is being compiled for, as `jax.default_backend` does."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiled_for(target: str) -> Iterator[None]:
    """Trace for another kind of device than this machine's.

    Args:
        target: "cpu", "gpu" or "tpu".
    """
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)
