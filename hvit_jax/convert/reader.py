"""Reading weights without running what is in their files; torch is imported only here."""

from __future__ import annotations

import argparse
import functools
import hashlib
import pathlib
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32
from rich.progress import Progress
from safetensors import SafetensorError, safe_open

from hvit_jax.convert.entries import choose_model
from hvit_jax.errors import InputError, first_line, import_optional
from hvit_jax.system.library_messages import refused_class

OWN = "hvit_jax"  # What `export_file` writes beside the weights is called so.
_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"
_CHUNK = 1 << 22
# What is read, by its name in safetensors.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Classes of values that training programs store beside weights. They are made without running
# anything of the file's, and not looked at.
_HARMLESS = [argparse.Namespace, pathlib.PosixPath]


# An array's shape, and its numbers or what is wrong with it.
_Examined = tuple[tuple[int, ...], np.ndarray | str]


@dataclass(frozen=True)
class StateDict:
    """A state dict as it was read.

    Attributes:
        name: what to call the file in errors.
        arrays: in float32, by key; half precision has been widened, double precision narrowed.
        shapes: the shape of every entry, () for one that is no array.
        flaws: what is wrong with an entry, by key.
        sha256: of the file.
        own: what `export_file` wrote beside the weights, a description as JSON; "" if it did not.
        said: what there is to say about the reading, as `choose_model` does, and "narrowed".
    """

    name: str
    arrays: dict[str, Float32[np.ndarray, "*shape"]]
    shapes: dict[str, tuple[int, ...]]
    flaws: dict[str, str]
    sha256: str
    own: str = ""
    said: dict[str, Any] = field(default_factory=dict)


def import_torch() -> Any:
    """Import PyTorch, which the library itself does not need."""
    return import_optional("torch", 'this needs PyTorch: pip install "hvit-jax[convert]"')


def read_state_dict(path: Path, progress: Progress, entry: str | None = None) -> StateDict:
    """Read a state dict, whatever dicts, prefixes and wrappers stand around it.

    Args:
        path: a file written by `torch.save`, or a `.safetensors` file, which needs no PyTorch.
        progress: shows how far it is.
        entry: which of several models to read; None: averaged weights before others.

    Raises:
        InputError: if it is missing, damaged, holds anything that loading would run, or no state
            dict.
    """
    if not path.is_file():
        raise InputError(_why_no_file(path))
    if _is_safe(path):
        top, about, examine = _open_safetensors(path)
    else:
        torch = import_torch()
        top, about, examine = _load(torch, path, progress), None, functools.partial(_examine, torch)
    values, holder, said = choose_model(path, top, entry)
    metadata = getattr(holder, "_metadata", None)  # As PyTorch's own state dicts have it.
    about = metadata.get("") if isinstance(metadata, Mapping) else about
    own = about.get(OWN) if isinstance(about, Mapping) else None
    own = own if isinstance(own, str) else ""
    read = StateDict(str(path), {}, {}, {}, _sha256(path, progress), own, said)
    for key, value in progress.track(values.items(), description="checking numbers"):
        read.shapes[key], array = examine(value)
        if isinstance(array, str):
            read.flaws[key] = array
            continue
        with np.errstate(over="ignore"):
            read.arrays[key] = array.astype(np.float32, copy=False)
        if array.dtype == np.float64:
            said["narrowed"] = "float64 to float32"
        if not np.isfinite(read.arrays[key]).all():
            large = ", or too large ones for float32" if array.dtype == np.float64 else ""
            read.flaws[key] = f"holds NaN or infinite numbers{large}"
    return read


def _is_safe(path: Path) -> bool:
    with open(path, "rb") as file:  # Eight bytes of length, then JSON.
        return file.read(9)[4:] == b"\0\0\0\0{" or path.suffix.lower() == ".safetensors"


def _open_safetensors(path: Path) -> tuple[dict[str, str], Any, Callable[[str], _Examined]]:
    try:
        file: Any = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is truncated, damaged, or not a safetensors file ({first_line(error)})"
        ) from error

    def examine(key: str) -> _Examined:
        about = file.get_slice(key)
        flaw = "" if about.get_dtype() in _DTYPES else _wrong_dtype(about.get_dtype())
        return tuple(about.get_shape()), flaw or file.get_tensor(key)

    return {key: key for key in file.keys()}, file.metadata(), examine


def _why_no_file(path: Path) -> str:
    if (path / "model.json").is_file():
        return f"{path} is a converted checkpoint; to turn it into a PyTorch file, use --to-torch"
    if path.is_dir():
        return f"{path} is a folder; expected a .torch, .pth or .safetensors file"
    return f"{path} is no regular file" if path.exists() else f"{path} does not exist"


def _load(torch: ModuleType, path: Path, progress: Progress) -> Any:
    with open(path, "rb") as file:
        start = file.read(4)
    try:
        zipped = start == _ZIP_START
        if zipped:
            _check_records(path, progress)
        harmless = torch.serialization.safe_globals(_HARMLESS)
        with harmless, warnings.catch_warnings():
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


def _examine(torch: ModuleType, value: Any) -> _Examined:
    if not isinstance(value, torch.Tensor):
        return (), f"is of type {type(value).__name__}, not a tensor"
    flaw = ""
    if str(value.dtype).removeprefix("torch.") not in _DTYPES.values():
        flaw = _wrong_dtype(value.dtype)
    elif value.layout != torch.strided or value.device.type != "cpu":
        flaw = f"is a {value.layout} tensor on device {value.device}, not a plain one"
    elif value.numel() > (held := value.untyped_storage().nbytes() // value.element_size()):
        flaw = f"claims {value.numel()} numbers, of which {held} are stored"
    if flaw:
        return tuple(value.shape), flaw
    wide = torch.promote_types(value.dtype, torch.float32)  # NumPy has no bfloat16 of its own.
    return tuple(value.shape), value.detach().to(wide).numpy()


def _wrong_dtype(dtype: Any) -> str:
    return f"is {dtype}, not float32, float16, bfloat16 or float64"


def _sha256(path: Path, progress: Progress) -> str:
    progress.add_task("hashing", total=None)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
