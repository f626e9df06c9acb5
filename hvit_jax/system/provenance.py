"""Where numbers come from: versions and device; and what differs from before."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Collection, Mapping
from typing import Any

import jax

from hvit_jax.fields import show
from hvit_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "grain")
# Content, the option that names where it lies, and what to call it.
_CONTENTS = (
    ("checkpoint_sha256", "checkpoint", "another checkpoint in"),
    ("data_sha256", "data", "other pictures in"),
    ("validation_sha256", "val", "other validation pictures in"),
)
# Entries that hold options of a command line, and those that say nothing more about content.
_OPTIONS = ("settings", "options", "args")
_REPEATED = ("checkpoint_source",)


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
    """Name what differs between two runs, and nothing else.

    Data and checkpoint are what they contain: where they lie matters only if that differs.

    Args:
        before: how the first run was described, as in its file; what it does not have is not
            compared.
        now: how the second one is.
        but: entries whose changes are not named.

    Returns:
        Such as "with --batch-size 8, now 16"; empty if nothing differs.
    """
    content, same = _content_changes(before, now, but)
    found = []
    for name, value in now.items():
        old = before.get(name)
        if name not in before or old == value or name in (*_REPEATED, *but):
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            named = _as_flag if name in _OPTIONS else str
            found += [
                _change(named(each), old[each], value[each])
                for each in value
                if each in old and old[each] != value[each] and each not in same
            ]
        elif name not in (each for each, _, _ in _CONTENTS):
            found.append(_change(_as_flag(name) if name == "method" else name, old, value))
    return found + content


def _content_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], but: Collection[str]
) -> tuple[list[str], list[str]]:
    """Compare content: what changed in its place, and the options whose content did not."""
    found, same = [], []
    for name, option, words in _CONTENTS:
        if name not in before or name not in now:
            continue
        old, new = (_option(about, option) for about in (before, now))
        if before[name] == now[name]:
            same.append(option)
        elif old == new and name not in but:
            found.append(f"with {words} {new or 'DATA'} than now")
    return found, same


def _option(about: Mapping[str, Any], name: str) -> Any:
    return next((about[each].get(name) for each in _OPTIONS if name in about.get(each, {})), None)


def _as_flag(name: str) -> str:
    return "DATA" if name == "data" else "--" + name.replace("_", "-")


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, bool) and isinstance(now, bool):
        words = name.removeprefix("--").replace("-", " ")
        return f"{_with(before)} {words}, now {_with(now)}"
    if before in (None, ""):
        return f"without {name}, now {show(now)}"
    if now in (None, ""):
        return f"with {name} {show(before)}, now without"
    return f"with {name} {show(before)}, now {show(now)}"


def _with(given: bool) -> str:
    return "with" if given else "without"
