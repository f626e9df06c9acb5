"""Result files: checked before the work, written whole or not at all after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from hvit_jax.errors import InputError


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Check that a file can be written, before the work that fills it starts.

    Args:
        path: where to.
        overwrite: whether a file that exists may be replaced.

    Raises:
        InputError: if it exists, or its folder is missing or cannot be written.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"{path} is {what}; give the name of a file to write")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; --overwrite replaces it")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    # Only writing shows whether writing is possible: think of full and read-only disks.
    probe = _beside(path)
    try:
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path: where to; replaced if it exists.
        write: writes the contents to an open file.

    Raises:
        InputError: if it cannot be written, for want of space or permission.
    """
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _cannot_write(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror or error}")
