"""The device that numbers come from: its name, versions, and how fast it multiplies."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from hvit_jax.errors import InputError
from hvit_jax.profiling.timing import device_work, time_in_turns
from hvit_jax.system.provenance import describe_runtime


def describe_device(devices: int = 1, *, torch: bool = False) -> dict[str, Any]:
    """Name device, backend, processors, versions and XLA's flags.

    Args:
        devices: how many of them compute.
        torch: whether numbers depend on PyTorch's version too.
    """
    runtime = describe_runtime(devices)
    if torch:
        runtime["versions"] |= {"torch": importlib.metadata.version("torch")}
    return {
        **runtime,
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    """Name the processor; Linux tells its model, other systems less."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def matmul_peak(dtype: str, *, seconds: float) -> float:
    """Measure the fastest large matrix product, in floating-point operations per second.

    Args:
        dtype: of both factors.
        seconds: how long to measure, about.

    Returns:
        Operations per second; a multiply-add counts as two.
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    work = device_work(lambda: product(x, x))
    (times,) = time_in_turns([work], seconds=max(seconds, 1.0) / 5)
    return 2 * size**3 / min(times)


def use_compilation_cache(wanted: bool = True) -> Path | None:
    """Keep compiled programs on disk, so that a second run starts in seconds.

    JAX_COMPILATION_CACHE_DIR wins over the default, hvit_jax/xla in XDG_CACHE_HOME or ~/.cache.

    Args:
        wanted: False to keep and read none, whatever the environment says.

    Returns:
        The folder; None if not wanted.

    Raises:
        InputError: if it cannot be made.
    """
    if not wanted:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path(home, "hvit_jax", "xla"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot keep compiled programs in {folder}: {error.strerror or error}; set "
            "JAX_COMPILATION_CACHE_DIR, or use --no-cache"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder
