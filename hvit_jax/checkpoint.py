"""Checkpoints on disk: an Orbax folder of weights and a small JSON description.

DIR/model.json   sizes, where the weights came from, format version
DIR/weights/     Orbax checkpoint of the tree in hvit_jax.models.parameters
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hvit_jax.config import ViTConfig, as_pair
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, abstract_parameters, flatten
from hvit_jax.models.positions import resize_positions

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS = "model.json", "weights"


@dataclass(frozen=True)
class Description:
    """What `model.json` says.

    Attributes:
        config: the model's sizes.
        source: where the weights came from: file name, SHA-256, format, and the like.
        classes: names of the classes in the head's order; empty if they are not known.
    """

    config: ViTConfig
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()


def save_checkpoint(directory: str | Path, parameters: Tree, description: Description) -> None:
    """Write a checkpoint; the folder appears whole or not at all.

    Args:
        directory: where to; must not exist.
        parameters: the tree to save.
        description: what to write beside it.

    Raises:
        InputError: if the folder exists, or cannot be written.
    """
    with new_folder(directory) as temporary:
        text = {
            "format_version": FORMAT_VERSION,
            "config": dataclasses.asdict(description.config),
            "source": description.source,
            "classes": list(description.classes),
        }
        (temporary / DESCRIPTION).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / WEIGHTS, parameters)


@contextlib.contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """Make a folder that takes its name only once it is complete.

    Args:
        directory: the final name.

    Yields:
        A temporary folder beside it, to be filled.

    Raises:
        InputError: if the name is taken, or the place cannot be written.
    """
    target = Path(directory).absolute()
    if target.exists():
        raise InputError(f"{directory} exists already; remove it or choose another destination")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        os.rename(temporary, target)
    except OSError as error:
        raise InputError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def read_description(directory: str | Path) -> Description:
    """Read and check `model.json`.

    Raises:
        InputError: if the folder is missing, no checkpoint, or of another format version.
    """
    path = Path(directory) / DESCRIPTION
    if not Path(directory).exists():
        raise InputError(f"checkpoint {directory} does not exist")
    if not path.is_file():
        raise InputError(
            f"{directory} is not a checkpoint: it has no {DESCRIPTION}; "
            f"make one with: python -m convert SOURCE.torch {directory}.jax"
        )
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        version = text["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {version!r}, this release reads {FORMAT_VERSION}"
            )
        sizes = dict(text["config"])
        config = ViTConfig(**{**sizes, "resolution": as_pair(sizes["resolution"])})
        return Description(config, dict(text["source"]), tuple(text["classes"]))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def load_parameters(directory: str | Path, config: ViTConfig) -> Tree:
    """Read a checkpoint's weights as NumPy arrays.

    Args:
        directory: the checkpoint.
        config: its description's sizes, which every array is checked against.

    Raises:
        InputError: if the weights are missing, damaged, or are not those of `config`; all missing,
            surplus and misshapen arrays are listed.
    """
    weights = Path(directory).absolute() / WEIGHTS
    if not weights.is_dir():
        raise InputError(f"{directory} is not a checkpoint: it has no folder {WEIGHTS}")
    wanted = abstract_parameters(config)
    with ocp.PyTreeCheckpointer() as checkpointer:
        try:
            found = checkpointer.metadata(weights).item_metadata.tree
        except Exception as error:  # Orbax and TensorStore have no common base class.
            raise _damaged(directory, error) from error
        _compare(directory, flatten(found), flatten(wanted))
        numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        try:
            return checkpointer.restore(weights, item=wanted, restore_args=numpy)
        except Exception as error:
            raise _damaged(directory, error) from error


def _damaged(directory: str | Path, error: Exception) -> InputError:
    reason = str(error).strip().splitlines() or [""]
    return InputError(
        f"checkpoint {directory} is damaged: {type(error).__name__}: {reason[0][:300]}"
    )


def _compare(directory: str | Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise one error that lists every difference between stored and expected arrays."""
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, not {wanted[name].shape}"
        for name in wanted
        if name in found and tuple(found[name].shape) != wanted[name].shape
    ]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "wrong shape": misshapen,
    }
    text = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if text:
        raise InputError(
            f"checkpoint {directory} does not hold the model of its {DESCRIPTION}; "
            + "; ".join(text)
        )


def resize_parameters(parameters: Tree, config: ViTConfig, new: ViTConfig) -> Tree:
    """Fit parameters to another resolution by resizing the position embeddings.

    Args:
        parameters: a tree for `config`.
        config: the sizes it has.
        new: the same sizes with another resolution.
    """
    positions = resize_positions(
        np.asarray(parameters["pos_embedding"], np.float32), config.grid, new.grid
    )
    return {**parameters, "pos_embedding": positions}
