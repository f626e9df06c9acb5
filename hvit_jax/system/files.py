"""Files and folders that appear whole or not at all, and that tell when they have been damaged."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from hvit_jax.errors import InputError

_CHUNK = 1 << 22
_PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)  # Seconds between attempts at a removal.


@contextlib.contextmanager
def writing(name: str | Path) -> Iterator[None]:
    """Turn what the system says against writing a file or folder into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror or error}") from error


def new_folder(directory: str | Path) -> AbstractContextManager[Path]:
    """Make a folder that takes its name only once it is complete.

    Returns:
        A context of a temporary folder beside it, to be filled; it raises an InputError if the name
        is taken, or the place cannot be written.
    """
    return _new(directory, Path.mkdir, _remove_tree)


def new_file(name: str | Path, *, replace: bool = False) -> AbstractContextManager[Path]:
    """Make a file as `new_folder` makes folders; `replace` lets it take the place of another."""
    return _new(name, Path.touch, _remove_file, replace=replace)


@contextlib.contextmanager
def _new(
    name: str | Path,
    make: Callable[[Path], None],
    remove: Callable[[Path], None],
    *,
    replace: bool = False,
) -> Iterator[Path]:
    temporary = _beside(name)
    try:
        with writing(name):
            if not replace:
                refuse_existing(name)
                temporary.parent.mkdir(parents=True, exist_ok=True)
            make(temporary)
            yield temporary
            if not replace:
                refuse_existing(name)
            temporary.replace(Path(name).absolute())
    except BaseException:
        remove(temporary)
        raise


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write or replace a file, whole or not at all, even where the machine stops.

    Args:
        path: where to.
        write: writes the contents to an open file.

    Raises:
        InputError: if it cannot be written, for want of space or permission.
    """
    with new_file(path, replace=True) as temporary, temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, *, lists: bool = False) -> Any:
    """Read a file that holds one JSON object, a dictionary; with `lists`, or a list.

    Raises:
        InputError: if it cannot be read, is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict | list if lists else dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all; NaN and infinity are refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def remove_folder(folder: Path, *, still_written: bool = False) -> None:
    """Remove a folder, if it is there.

    Its name is free at once, so that a kill leaves all of it or nothing under that name.

    Args:
        folder: the folder.
        still_written: whether threads of a library that has failed may still write under its name,
            where TensorStore makes folders anew; nothing else may use the name then.
    """
    gone = _beside(folder)
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"cannot remove {folder}: {error.strerror or error}") from error
    _remove_tree(gone, *([folder] if still_written else []))


def _beside(name: str | Path) -> Path:
    """Name a hidden temporary file or folder beside another; no two are the same."""
    target = Path(name).absolute()
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}.partial")


def _remove_file(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _remove_tree(*folders: Path) -> None:
    """Remove folders, though threads of a library that has failed still write into them."""
    gone_before = False
    for pause in _PAUSES:
        gone = not any(map(os.path.lexists, folders))
        if gone and gone_before:  # TensorStore makes a folder anew where one is missing.
            return
        gone_before = gone
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(pause)


def refuse_existing(name: str | Path) -> None:
    """Refuse a name that is taken, before anything is computed for it.

    Raises:
        InputError: if something has this name, or it is too long or otherwise impossible.
    """
    try:
        Path(name).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InputError(f"cannot write {name}: {error.strerror or error}") from error
    raise InputError(f"{name} exists already; remove it or choose another destination")


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before the work that fills it starts."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise InputError(f"{path} is {what}; give the name of a file to write")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already; --overwrite replaces it")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a name in a folder that is not there, or cannot be written in.

    Raises:
        InputError: with what the system says.
    """
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    # Only writing shows whether writing is possible: think of full and read-only disks.
    probe = _beside(path)
    try:
        with writing(path):
            probe.write_bytes(b"x" * 4096)
    finally:
        _remove_file(probe)


def require_space(name: str | Path, folder: Path, needed: int) -> None:
    """Refuse to write more bytes than a folder's disk has, before a library runs into its end."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"cannot write {name}: no space left on the disk; it needs {needed / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free"
        )


def checksums(folder: Path) -> dict[str, dict[str, int]]:
    """Measure every file below a folder, by its path relative to it: length and CRC-32."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in files}


def _checksum(path: Path) -> dict[str, int]:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def damages(folder: Path, recorded: dict[str, dict[str, int]]) -> list[str]:
    """Describe every file that is missing or differs from what `checksums` recorded of it."""
    found = []
    for name, wanted in recorded.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != wanted["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}")
        elif _checksum(path) != wanted:
            found.append(f"{name} has another content than was written")
    return found
