"""Texts of other libraries that are read, in one place: no class or code of theirs says the same.

tests/system/test_library_messages.py provokes each of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory", "can't allocate memory")
_LOST_CONNECTION = re.compile(r"\bgloo\b|\bnccl\b|coordination.?service", re.I)
_SYSTEM_CODE = re.compile(r"os_error_code='(\d+)'")
_REFUSED_CLASS = re.compile(r"GLOBAL ([\w.]+)")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of JAX, PyTorch or Python says that memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_lost_connection(error: BaseException) -> bool:
    """Tell whether an error of JAX says that another process of the run is gone."""
    return _LOST_CONNECTION.search(str(error)) is not None


def is_dead_worker(error: BaseException) -> bool:
    """Tell whether an error of Grain says that one of its processes has died."""
    return "Worker process was terminated" in str(error)


def is_late_event(error: BaseException) -> bool:
    """Tell whether TensorStore spoke to an event loop of Orbax's that has failed already."""
    return str(error) == "Event loop is closed"


def refused_class(error: BaseException) -> str | None:
    """Name the class that PyTorch refused to load from a file, if that is why it failed."""
    found = _REFUSED_CLASS.search(str(error))
    return found[1] if found else None


def why_failed(error: BaseException) -> str:
    """Say in a few words why Orbax could not read or write: the system's reason, where known."""
    code = _SYSTEM_CODE.search(str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def ignore_warnings_of_pillow() -> None:
    """Drop, in this process, what Pillow warns of in pictures that it reads all the same.

    Corrupt EXIF data is such a thing. From a decoding process it would break the progress bar.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


@contextlib.contextmanager
def without_messages_of_orbax() -> Iterator[None]:
    """Drop what Orbax logs: errors that it raises as well, and what it does not do on purpose."""
    import absl.logging  # Makes its logger, which says where a message comes from only then.

    loggers = [absl.logging.get_absl_logger(), logging.getLogger("asyncio")]
    loggers = [logger for logger in loggers if _wanted not in logger.filters]
    for logger in loggers:
        logger.addFilter(_wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    about = record.pathname if record.name == "absl" else record.getMessage()
    return record.levelno < logging.WARNING or "orbax" not in about
