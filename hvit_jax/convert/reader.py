"""Reading and writing PyTorch's files; torch is imported only when one is touched."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np

from hvit_jax.errors import InputError


def import_torch() -> ModuleType:
    """Import PyTorch, which only conversion needs.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'converting needs PyTorch ({error}); install it with: pip install "hvit-jax[convert]"'
        ) from error
    return torch


def sha256(path: Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Read a state dict as float32 arrays."""
    torch = import_torch()
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {key: tensor.float().numpy() for key, tensor in state.items()}
