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
from hvit_jax.system.files import read_json
from hvit_jax.system.library_messages import refused_class

OWN = "hvit_jax"  # What `export_file` writes beside the weights is called so.
_ZIP_START, _PICKLE_START = b"PK\x03\x04", b"\x80"
_CHUNK = 1 << 22
_INDEX = ".index.json"
# Of the files of weights in a folder, the first of these is taken.
_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
)
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt", ".torch", ".ckpt")
# What is read, by its name in safetensors.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Classes of values that training programs store beside weights. They are made without running
# anything of the file's, and not looked at.
_HARMLESS = [argparse.Namespace, pathlib.PosixPath]


# An array's shape, what is wrong with it or "", and its numbers, which are read on demand.
_Examined = tuple[tuple[int, ...], str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class StateDict:
    """A state dict whose numbers are read one array at a time.

    Attributes:
        name: what to call the file in errors.
        shapes: the shape of every entry, () for one that is no array.
        flaws: what is wrong with an entry, by key.
        numbers: reads the numbers of an entry without flaw, as they are stored.
        sha256: of the file; of several one after another.
        own: what `export_file` wrote beside the weights, a description as JSON; "" if it did not.
        said: what there is to say about the reading, as `choose_model` does, and "narrowed".
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    flaws: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    sha256: str = ""
    own: str = ""
    said: dict[str, Any] = field(default_factory=dict)

    def read(self, key: str) -> Float32[np.ndarray, "*shape"]:
        """Read an array in float32: half precision is widened, double precision narrowed."""
        array = self.numbers[key]()
        if array.dtype == np.float64:
            self.said["narrowed"] = "float64 to float32"
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)

    def flaw(self, key: str) -> str:
        """Say what is wrong with an entry or its numbers; "": nothing."""
        if key in self.flaws:
            return self.flaws[key]
        if 0 in self.shapes[key]:
            return "holds no numbers"
        if np.isfinite(self.read(key)).all():
            return ""
        large = self.numbers[key]().dtype == np.float64
        return "holds NaN or infinite numbers" + ", or too large ones for float32" * large


def import_torch() -> Any:
    """Import PyTorch, which the library itself does not need."""
    return import_optional("torch", 'this needs PyTorch: pip install "hvit-jax[convert]"')


def read_state_dict(path: Path, progress: Progress, entry: str | None = None) -> StateDict:
    """Open a state dict, whatever dicts, prefixes and wrappers stand around it.

    Args:
        path: a file written by `torch.save`, a `.safetensors` file, which needs no PyTorch, or a
            folder of one or several of these as the Hugging Face hub has them.
        progress: shows how far it is.
        entry: which of several models to read; None: averaged weights before others.

    Raises:
        InputError: if it is missing, damaged, holds anything that loading would run, or no state
            dict.
    """
    files = weight_files(path)
    if any(files.values()):
        top, about, examine = _open_shards(path, files, progress), None, lambda value: value()
    else:
        top, about, examine = _open(next(iter(files)), progress)
    values, holder, said = choose_model(path, top, entry)
    metadata = getattr(holder, "_metadata", None)  # As PyTorch's own state dicts have it.
    about = metadata.get("") if isinstance(metadata, Mapping) else about
    own = about.get(OWN) if isinstance(about, Mapping) else None
    own = own if isinstance(own, str) else ""
    read = StateDict(str(path), {}, sha256=_sha256([*files], progress), own=own, said=said)
    for key, value in values.items():
        read.shapes[key], flaw, read.numbers[key] = examine(value)
        if flaw:
            read.flaws[key] = flaw
    return read


def weight_files(path: Path) -> dict[Path, set[str]]:
    """Find the files of weights: the path itself, or those of a folder.

    Of several in a folder the first kind of `_WEIGHTS` is taken; an index names its shards.

    Returns:
        The keys that an index says to be in each file; none without an index.

    Raises:
        InputError: if there is none, several that are all of another name, or a shard is missing.
    """
    if path.is_file():
        return {path: set()}
    if not path.is_dir():
        raise InputError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}")
    if (path / "model.json").is_file():
        raise InputError(
            f"{path} is a converted checkpoint; to turn it into a PyTorch file, use --to-torch"
        )
    for name in _WEIGHTS:
        if (path / name).is_file():
            return _shards(path / name) if name.endswith(_INDEX) else {path / name: set()}
    found = sorted(file for file in path.iterdir() if file.suffix in _ENDINGS and file.is_file())
    if len(found) != 1:
        names = f"holds several: {', '.join(file.name for file in found)}" if found else "has none"
        raise InputError(
            f"{path} is a folder; of files of weights, such as {_WEIGHTS[0]}, it {names}"
        )
    return {found[0]: set()}


def _shards(index: Path) -> dict[Path, set[str]]:
    """List the files that an index names, with the keys that it says to be in each."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise InputError(f"{index} holds no weight_map, which tells the file of each key")
    names = sorted(set(map(str, named.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index} names a file outside of its folder: {outside[0]}")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise InputError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")
    return {
        index.parent / name: {key for key, place in named.items() if place == name}
        for name in names
    }


def _open_shards(path: Path, files: dict[Path, set[str]], progress: Progress) -> dict[str, Any]:
    """Open several files as one dict, whose values give what is known of an array."""
    joined: dict[str, Any] = {}
    for file, named in files.items():
        held, _, examine = _open(file, progress)
        if again := sorted(map(str, joined.keys() & held)):
            raise InputError(f"{path} holds {again[0]} twice, the second time in {file.name}")
        if lacking := sorted(named - held.keys()):
            raise InputError(f"{file} lacks {lacking[0]}, which the index names")
        joined |= {key: functools.partial(examine, value) for key, value in held.items()}
    return joined


def _open(path: Path, progress: Progress) -> tuple[Any, Any, Callable[[Any], _Examined]]:
    """Open a file: what it holds, what stands beside that, and how values are looked at."""
    if _is_safe(path):
        return _open_safetensors(path)
    torch = import_torch()
    return _load(torch, path, progress), None, functools.partial(_examine, torch)


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
        return tuple(about.get_shape()), flaw, functools.partial(file.get_tensor, key)

    return {key: key for key in file.keys()}, file.metadata(), examine


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
    except InputError:
        raise
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
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise InputError(
                f"{path} is a TorchScript archive, which holds code; save its weights: "
                "torch.save(torch.jit.load(PATH, map_location='cpu').state_dict(), 'weights.pt')"
            )
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
        return (), f"is of type {type(value).__name__}, not a tensor", _nothing
    flaw = ""
    if str(value.dtype).removeprefix("torch.") not in _DTYPES.values():
        flaw = _wrong_dtype(value.dtype)
    elif value.layout != torch.strided or value.device.type != "cpu":
        flaw = f"is a {value.layout} tensor on device {value.device}, not a plain one"
    elif value.numel() > (held := value.untyped_storage().nbytes() // value.element_size()):
        flaw = f"claims {value.numel()} numbers, of which {held} are stored"

    def numbers() -> np.ndarray:
        wide = torch.promote_types(value.dtype, torch.float32)  # NumPy has no bfloat16 of its own.
        return value.detach().to(wide).numpy()

    return tuple(value.shape), flaw, numbers


def _nothing() -> np.ndarray:
    return np.empty(())


def _wrong_dtype(dtype: Any) -> str:
    return f"is {dtype}, not float32, float16, bfloat16 or float64"


def _sha256(files: list[Path], progress: Progress) -> str:
    """Hash files, as of one after another."""
    progress.add_task("hashing", total=None)
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
