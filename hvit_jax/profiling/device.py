"""The device that numbers come from: what it is, and how long work takes on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.errors import InputError
from hvit_jax.system.provenance import describe_runtime

ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        start: begins the work, and may return before it is done; its result goes to `wait`.
        wait: returns when the result, and so all work before it, is done.
    """

    start: Callable[[], object]
    wait: Callable[[object], object]

    def seconds(self, calls: int) -> float:
        """Time several calls that are enqueued together; the average of one."""
        started = time.perf_counter()
        for _ in range(calls - 1):
            self.start()
        self.wait(self.start())
        return (time.perf_counter() - started) / calls


def device_work(run: Callable[[], object]) -> Work:
    """Time a JAX function by its calls, enqueued on a GPU.

    On a CPU each is waited for: enqueued there, they would run beside each other, as PyTorch's do
    not.
    """
    if jax.default_backend() == "cpu":
        return Work(lambda: jax.block_until_ready(run()), lambda result: None)
    return Work(run, jax.block_until_ready)


def time_in_turns(
    works: Sequence[Work], *, seconds: float, rounds: int = ROUNDS
) -> list[list[float]]:
    """Time several works in turns, so that a machine that grows slower harms all alike.

    Args:
        works: what to time; each is called once before, to warm up.
        seconds: how long a round of one work should take, about.
        rounds: how often each has its turn.

    Returns:
        Seconds of one call, for each work a list of its rounds.
    """
    for work in works:
        work.seconds(1)
    calls = [max(1, round(seconds / work.seconds(1))) for work in works]
    turns = [
        [work.seconds(count) for work, count in zip(works, calls, strict=True)]
        for _ in range(rounds)
    ]
    return [list(of_one) for of_one in zip(*turns, strict=True)]


def time_alone(work: Work, *, seconds: float, least: int = 5, most: int = 200) -> list[float]:
    """Time calls one by one, each waited for: what a single request takes.

    Args:
        work: what to time.
        seconds: when to stop, about.
        least: calls at least.
        most: calls at most.

    Returns:
        Seconds of each call.
    """
    work.seconds(1)
    times, end = [], time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        times.append(work.seconds(1))
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """Find the value that a share of the values, from 0 to 1, does not exceed."""
    return float(np.quantile(values, share, method="higher"))


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
