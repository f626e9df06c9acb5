"""The one exception that stands for a user's mistake, and how command lines report it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, and what would be right.

    Command lines print the message as one line and exit with status 2. Every other exception is a
    defect of this project and keeps its traceback.
    """


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Describe an unknown name: what was given, the nearest known name, and all known ones.

    Args:
        kind: what the name stands for, such as "method".
        name: the name that was given.
        known: the names that would be accepted.

    Returns:
        The error, to be raised by the caller.
    """
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}{hint} (known: {', '.join(known) or 'none'})")


def import_optional(name: str, advice: str) -> Any:
    """Import a module that not every installation has.

    Args:
        name: the module.
        advice: what needs it, and how to install it.

    Raises:
        InputError: that says so, and why the import failed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{advice} ({error})") from error


def first_line(error: BaseException) -> str:
    """Give the first line of an error's message, or its kind where it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
