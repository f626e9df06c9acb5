"""Which device a program is compiled for, this machine's or another, and with which options."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def backend() -> str:
    """Name the kind of device that is being compiled for, as `jax.default_backend` does."""
    return _TARGET.get() or jax.default_backend()


def is_exported() -> bool:
    """Tell whether a program is traced for other machines than this one."""
    return _TARGET.get() is not None


def compiler_options() -> dict[str, Any] | None:
    """List the options of XLA that a model's program is compiled with; None for its defaults.

    On a GPU XLA's own kernels for products are left out. It tries them for every product and then
    gives most back to cuBLAS, but without the bias, GELU and residual sum that cuBLAS can take on.
    """
    return {"xla_gpu_enable_triton_gemm": False} if backend() == "gpu" else None


@contextlib.contextmanager
def compiled_for(target: str) -> Iterator[None]:
    """Trace for another kind of device than this machine's.

    Args:
        target: "cpu", "gpu" or "tpu".
    """
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)
