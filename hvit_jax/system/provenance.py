"""Where numbers come from: versions and device; and what differs from before."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from typing import Any

import jax

from hvit_jax.fields import flag, show
from hvit_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "grain")
# What names the content that an evaluation depends on.
FINGERPRINTS = ("data_sha256", "checkpoint_sha256", "labels_sha256", "train_data_sha256")
FINGERPRINTS += ("text_embeddings_sha256",)
# Content: the option that names where it lies, and what to call it.
_CONTENTS = {
    "checkpoint_sha256": ("--checkpoint", "another checkpoint in"),
    "data_sha256": ("DATA", "other pictures in"),
    "train_data_sha256": ("--train-data", "other training pictures in"),
    "text_embeddings_sha256": ("--text-embeddings", "other text embeddings in"),
    "labels_sha256": ("--labels", "other labels of"),
    "validation_sha256": ("--val", "other validation pictures in"),
}
_OPTIONS = ("settings", "options", "config", "args")  # Entries that hold options of a command line.
_REPEATED = ("checkpoint_source",)  # These say nothing more about content.


def versions() -> dict[str, str]:
    """Name the versions of Python and of the packages that decide on the numbers."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"hvit_jax": __version__, "python": platform.python_version(), **found}


def describe_runtime(devices: int = 1) -> dict[str, Any]:
    """Name device, how exact its matrix products are, and versions.

    Args:
        devices: how many of them compute, of all processes together.
    """
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "device": jax.devices()[0].device_kind,
        "devices": devices,
        "matmul_precision": precision or "default",
        "versions": versions(),
    }


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, but: Collection[str] = ()
) -> list[str]:
    """Name what differs between two runs, such as "with --batch-size 8, now 16".

    Data and checkpoint are what they contain: where they lie matters only if that differs.

    Args:
        before: how the first run was described; what it does not have is not compared.
        now: how the second one is.
        but: entries, and options by their flags, whose changes are not named.
    """
    old, new = _flat(before, but), _flat(now, but)
    found, contents = [], []
    for name, (place, words) in _CONTENTS.items():
        if name in old and name in new:
            moved = old.get(place) != new.get(place)
            if old.pop(name) == new.pop(name):
                new.pop(place, None)
            elif not moved and name not in but:
                contents.append(f"with {words} {new.get(place) or 'DATA'} than now")
    for name, value in new.items():
        if name in old and old[name] != value and name not in but:
            found.append(_change(name, old[name], value))
    return found + contents


def _flat(about: Mapping[str, Any], but: Collection[str]) -> dict[str, Any]:
    """Name entries as messages do: options by their flags, what lies in dictionaries alone."""
    flat = {}
    for name, value in about.items():
        if name in (*_REPEATED, *but) and name not in _CONTENTS:
            continue
        if not isinstance(value, Mapping):
            flat["--method" if name == "method" else name] = value
        elif name in _OPTIONS:
            flat |= _by_flags(value)
        else:
            flat |= value
    return flat


def _by_flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """Name options by their flags; those of a record within the record stand beside the others."""
    flat = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= _by_flags(value)
        else:
            flat["DATA" if name == "data" else flag(name)] = value
    return flat


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, bool) and isinstance(now, bool):
        words = name.removeprefix("--").replace("-", " ")
        return f"with {words}, now without" if before else f"without {words}, now with"
    if before in (None, ""):
        return f"without {name}, now {show(now)}"
    if now in (None, ""):
        return f"with {name} {show(before)}, now without"
    return f"with {name} {show(before)}, now {show(now)}"
