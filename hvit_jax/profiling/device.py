"""The device that numbers come from: what it is, and how long work takes on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from hvit_jax.ops.float8 import FLOAT8, product
from hvit_jax.system.provenance import describe_runtime

Value = TypeVar("Value")


@dataclass(frozen=True)
class Work:
    """Something to time."""

    start: Callable[[], object]  # Begins the work, and may return before it is done.
    wait: Callable[[object], object]  # Returns when this result, and all before it, is there.

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


def time_in_turns(works: Sequence[Work], *, seconds: float, rounds: int = 5) -> list[list[float]]:
    """Time several works in turns, so that a machine that grows slower harms all alike.

    Each is called once to warm up, and then has its turn of about `seconds` in every round.

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


def program_memory(program: jax.stages.Compiled) -> int | None:
    """Give the bytes that a program needs on each device, as the compiler planned them.

    They are those of weights, images, results and what lies between; None where it does not tell.
    """
    memory: Any = program.memory_analysis()
    return memory and (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def rates_and_ratios(
    times: Sequence[Sequence[float]], batch: int
) -> tuple[list[float], list[list[float]]]:
    """Give images a second of the first work, and how many times faster it was than each other.

    Both are lists of rounds, made of what `time_in_turns` returned.
    """
    own, *others = times
    ratios = [[theirs / mine for theirs, mine in zip(other, own, strict=True)] for other in others]
    return [batch / seconds for seconds in own], ratios


def time_alone(work: Work, *, seconds: float) -> list[float]:
    """Time 5 to 200 calls one by one, each waited for: what a single request takes."""
    work.seconds(1)
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or (len(times) < 200 and time.perf_counter() < end):
        times.append(work.seconds(1))
    return times


class Latest(Generic[Value]):
    """A function that remembers its last result, and frees it before it makes another."""

    def __init__(self, make: Callable[..., Value]):
        self._make, self._last = make, None

    def __call__(self, *key: Any) -> Value:
        """Give the function's result for these arguments."""
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = key, self._make(*key)
        return self._last[1]


def describe_device(devices: int = 1, *, beside: Sequence[str] = ()) -> dict[str, Any]:
    """Name what numbers depend on: devices, processors, versions and XLA's flags.

    Args:
        devices: how many compute.
        beside: packages whose versions matter too.
    """
    runtime = describe_runtime(devices)
    runtime["versions"] |= {name: importlib.metadata.version(name) for name in beside}
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
    """Measure the fastest large matrix product, in operations a second; a multiply-add is two."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    if dtype == "float8":
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(FLOAT8)
        multiply = jax.jit(lambda x: product(x, x, jnp.float32(1), jnp.bfloat16))
    else:
        x = jax.random.normal(jax.random.key(0), (size, size), dtype)
        multiply = jax.jit(lambda x: jnp.matmul(x, x))
    work = device_work(lambda: multiply(x))
    (times,) = time_in_turns([work], seconds=max(seconds, 1.0) / 5)
    return 2 * size**3 / min(times)
