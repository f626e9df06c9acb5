"""Compiled programs kept on disk, so that a second run starts in seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

from hvit_jax.errors import InputError
from hvit_jax.system.files import write_atomically

CACHE_HELP = "keep compiled programs on disk, in ~/.cache/hvit_jax/xla, and use those kept there"
_SECONDS = 0.5  # What compiles faster is not worth a file.


class WholeEntries(LRUCache):
    """JAX's cache on disk, with entries that appear whole or not at all.

    JAX writes them in place. Where it is killed meanwhile a cut one stays, which it cannot read and
    does not replace, so that the program is compiled in every later run.
    """

    def put(self, key: str, value: bytes) -> None:
        """Add an entry, unless there is one; of limited size, or in a bucket, as JAX does it."""
        entry = Path(self.path, f"{key}-cache")
        if self.eviction_enabled or _is_remote(self.path):
            super().put(key, value)
        elif not entry.exists():
            write_atomically(entry, lambda file: file.write(value))


def _is_remote(folder: Any) -> bool:
    return "://" in str(folder)


def use_compilation_cache(wanted: bool = True) -> str | None:
    """Keep compiled programs on disk; gives the folder, or None where none are kept.

    JAX_COMPILATION_CACHE_DIR, also a bucket, wins over the default, hvit_jax/xla in XDG_CACHE_HOME
    or ~/.cache.
    Where the cache is not wanted, no program is kept or read, whatever the environment says.

    Raises:
        InputError: if the folder cannot be made.
    """
    settings: Any = jax.config
    if not wanted:
        settings.update("jax_enable_compilation_cache", False)
    if not settings.jax_enable_compilation_cache:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = str(settings.jax_compilation_cache_dir or Path(home, "hvit_jax", "xla"))
    try:
        if not _is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot keep compiled programs in {folder}: {error.strerror or error}; set "
            "JAX_COMPILATION_CACHE_DIR, or use --no-cache"
        ) from error
    least = min(_SECONDS, settings.jax_persistent_cache_min_compile_time_secs)
    settings.update("jax_persistent_cache_min_compile_time_secs", least)
    settings.update("jax_compilation_cache_dir", folder)
    jax_cache: Any = compilation_cache
    jax_cache.LRUCache = WholeEntries  # What JAX opens the folder with.
    return folder
