"""Pictures named by what they are, so that a later run can tell whether they changed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

from hvit_jax.data.folder import ImageFolder
from hvit_jax.data.source import Source


def data_sha256(source: Source) -> str:
    """Name pictures by their content: their names, labels and, in folders, sizes in bytes."""
    digest = hashlib.sha256()
    for path, label in zip(source.paths, source.labels, strict=True):
        size = _size(source.root / path) if isinstance(source, ImageFolder) else ""
        digest.update(f"{path}\0{label}\0{size}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def names_crc32(paths: Sequence[str]) -> int:
    """Name which pictures there are and in which order, whatever is in them."""
    return zlib.crc32("\n".join(paths).encode("utf-8", "surrogateescape"))


def _size(path: Path) -> int | str:
    try:
        return os.stat(path).st_size
    except OSError:
        return ""  # Whoever opens the file says more.
