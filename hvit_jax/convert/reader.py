"""Reading PyTorch's files without running what is in them; torch is imported only here."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.progress import Progress

from hvit_jax.convert.entries import FoundModel, choose_model
from hvit_jax.errors import InputError
from hvit_jax.system.library_messages import refused_class

_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class StateDict:
    """A state dict as it was read.

    Attributes:
        name: what to call the file in errors.
        arrays: in float32, by key; half precision has been widened.
        shapes: the shape of every entry, () for one that is no array.
        flaws: what is wrong with an entry, by key.
        sha256: of the file.
        found: where in the file it was, and what else the file holds.
    """

    name: str
    arrays: dict[str, Float32[np.ndarray, "*shape"]]
    shapes: dict[str, tuple[int, ...]]
    flaws: dict[str, str]
    sha256: str
    found: FoundModel


def import_torch() -> ModuleType:
    """Import PyTorch, which the library itself does not need."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'this needs PyTorch ({error}); install it with: pip install "hvit-jax[convert]"'
        ) from error
    return torch


def read_state_dict(path: Path, progress: Progress, entry: str | None = None) -> StateDict:
    """Read a state dict, whatever dicts, prefixes and wrappers stand around it.

    Args:
        path: a file written by `torch.save`.
        progress: shows how far it is.
        entry: which of several models to read; None: averaged weights before others.

    Raises:
        InputError: if it is missing, damaged, holds anything that loading would run, or no state
            dict.
    """
    if not path.is_file():
        raise InputError(_why_no_file(path))
    torch = import_torch()
    found = choose_model(path, _load(torch, path, progress), entry)
    read = StateDict(str(path), {}, {}, {}, _sha256(path, progress), found)
    for key, value in progress.track(found.values.items(), description="checking numbers"):
        read.shapes[key] = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
        flaw = _flaw(torch, value)
        if not flaw:
            read.arrays[key] = value.detach().float().numpy()
            flaw = "" if np.isfinite(read.arrays[key]).all() else "holds NaN or infinite numbers"
        if flaw:
            read.flaws[key] = flaw
    return read


def _why_no_file(path: Path) -> str:
    if (path / "model.json").is_file():
        return f"{path} is a converted checkpoint; to turn it into a PyTorch file, use --to-torch"
    if path.is_dir():
        return f"{path} is a folder; expected a .torch or .pth file"
    return f"{path} is no regular file" if path.exists() else f"{path} does not exist"


def _load(torch: ModuleType, path: Path, progress: Progress) -> Any:
    with open(path, "rb") as file:
        start = file.read(4)
    try:
        zipped = start == _ZIP_START
        if zipped:
            _check_records(path, progress)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # Damaged bytes make torch and zipfile raise almost anything.
        raise InputError(_why_unreadable(path, start, error)) from error


def _why_unreadable(path: Path, start: bytes, error: Exception) -> str:
    refused = refused_class(error)
    pickled = isinstance(error, pickle.UnpicklingError) and start[:1] == _PICKLE_START
    if refused or pickled:
        held = refused or "pickled Python objects"
        return (
            f"{path} is refused: it holds {held}, and loading anything but tensors could run code; "
            "save the state dict alone: torch.save(model.state_dict(), PATH)"
        )
    if isinstance(error, pickle.UnpicklingError) and start != _ZIP_START:
        return f"{path} is not a PyTorch checkpoint"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f" ({lines[0][:200]})" if lines else ""
    return f"{path} is truncated, damaged, or not a PyTorch checkpoint{reason}"


def _check_records(path: Path, progress: Progress) -> None:
    """Compare each record of the archive with its checksum, which torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        # torch can be told not to compute checksums; it stores zeros then.
        records = [info for info in archive.infolist() if info.CRC]
        total = sum(info.file_size for info in records)
        task = progress.add_task("checking checksums", total=total)
        for info in records:
            with archive.open(info) as record:
                while chunk := record.read(_CHUNK):
                    progress.advance(task, len(chunk))


def _flaw(torch: ModuleType, value: Any) -> str:
    """Tell why a value cannot be a parameter; "" if it can."""
    if not isinstance(value, torch.Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"is {value.dtype}, not float32, float16 or bfloat16"
    if value.layout != torch.strided or value.device.type != "cpu":
        return f"is a {value.layout} tensor on device {value.device}, not a plain one"
    stored = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > stored:
        return f"claims {value.numel()} numbers, of which {stored} are stored"
    return ""


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    task = progress.add_task("hashing", total=path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()
