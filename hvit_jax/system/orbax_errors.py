"""What Orbax and TensorStore mean when they fail, without the pages that they log about it."""

from __future__ import annotations

import logging
import os
import re

_CODE = re.compile(r"os_error_code='(\d+)'")


def reason(error: BaseException) -> str:
    """Say in a few words why reading or writing failed: the system's reason, where it is known."""
    code = _CODE.search(str(error))
    if code is not None:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _wanted(record: logging.LogRecord) -> bool:
    """Drop what is logged of an error that is raised as well."""
    about = record.pathname if record.name == "absl" else record.getMessage()
    return record.levelno < logging.ERROR or "orbax" not in about


# Threads and tasks of Orbax log one failure many times, with tracebacks, beside our one line.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_wanted)
