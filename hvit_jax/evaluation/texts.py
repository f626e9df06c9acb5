"""Text embeddings of classes, from a file: what zero-shot classification compares pictures with."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from hvit_jax.errors import InputError
from hvit_jax.evaluation.heads import Linear

SCALE = 100.0  # CLIP's, where a file has none.
_LACKS = (
    "an .npz file of text embeddings holds embeddings (classes, channels) and classes, their names"
)


@dataclass(frozen=True)
class TextEmbeddings:
    """One embedding a class, as the text tower of a CLIP or SigLIP model makes them.

    Attributes:
        path: the file that they were read from.
        sha256: of its content.
        classes: their names.
        embeddings: one row a class, of any length.
        scale: what cosines are multiplied by.
        bias: what is added to them then.
    """

    path: Path
    sha256: str
    classes: tuple[str, ...]
    embeddings: Float[np.ndarray, "classes C"]
    scale: float = SCALE
    bias: float = 0.0

    @property
    def head(self) -> Linear:
        """What makes logits of image embeddings: their scaled cosines with every text's."""
        lengths = np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        kernel = self.scale * (self.embeddings / lengths).T
        bias = np.full(len(self.classes), self.bias, np.float32)
        return Linear(kernel.astype(np.float32), bias, normalised=True)


def read_text_embeddings(path: Path) -> TextEmbeddings:
    """Read `embeddings` and `classes`, and `logit_scale` and `logit_bias` where they are there.

    Raises:
        InputError: if the file cannot be read, lacks one of the first two, or holds numbers or
            names that cannot be used.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); {_LACKS}") from error
    if missing := [name for name in ("embeddings", "classes") if name not in found]:
        raise InputError(f"{path} has no {' and no '.join(missing)}; {_LACKS}")
    embeddings, classes = _floats(path, found["embeddings"]), found["classes"]
    if embeddings.ndim != 2 or classes.shape != embeddings.shape[:1] or classes.dtype.kind != "U":
        raise InputError(
            f"{path}: embeddings of shape {embeddings.shape} and classes of shape {classes.shape} "
            f"and type {classes.dtype}; {_LACKS}"
        )
    names = tuple(classes.tolist())
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path} has the class {twice[0]!r} more than once; one row a class")
    if not np.linalg.norm(embeddings, axis=1).all():
        raise InputError(f"{path} has embeddings that are all zeros, which have no direction")
    scale, bias = (_number(path, found, name) for name in ("logit_scale", "logit_bias"))
    if scale is not None and scale <= 0:
        raise InputError(f"{path}: logit_scale is {scale:g}; it is a factor above 0, such as 100")
    digest = hashlib.sha256(content).hexdigest()
    return TextEmbeddings(path, digest, names, embeddings, scale or SCALE, bias or 0.0)


def _number(path: Path, found: dict[str, np.ndarray], name: str) -> float | None:
    if name not in found:
        return None
    if found[name].size != 1:
        raise InputError(f"{path}: {name} is one number, got an array of {found[name].shape}")
    return float(_floats(path, found[name]).item())


def _floats(path: Path, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"{path} holds what is no finite number where numbers are expected")
    return array.astype(np.float32)
