"""One evaluation at a time writes into a folder of progress."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hvit_jax.errors import InputError
from hvit_jax.system.files import writing

SETTINGS = "settings.json"


def refuse_running(folder: Path) -> None:
    """Refuse a folder that an evaluation is writing into.

    Raises:
        InputError: if one does.
    """
    descriptor = lock(folder)
    if descriptor is not None:
        os.close(descriptor)


def lock(folder: Path) -> int | None:
    """Lock a folder until a descriptor is closed, or its process ends.

    Args:
        folder: of an evaluation's progress; its settings are what is locked.

    Returns:
        The descriptor; None if the folder holds no settings.

    Raises:
        InputError: if another evaluation has locked it.
    """
    path = folder / SETTINGS
    with writing(path):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise BlockingIOError  # The folder was made anew meanwhile.
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise busy(folder) from None
    except OSError:  # This file system knows no locks.
        pass
    return descriptor


def busy(folder: Path) -> InputError:
    """Say that another evaluation is at work in a folder."""
    output = folder.with_name(folder.name.removesuffix(".progress"))
    return InputError(f"another evaluation writes {output}; wait for it or choose another --output")
