"""Which device a program is compiled for, this machine's or another, and with which options."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax

Operation = TypeVar("Operation", bound=Callable[..., Any])

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
        target: "cpu", "gpu", "tpu", or "onnx" for the runtimes that read ONNX.
    """
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def one_operation(function: Operation) -> Operation:
    """Mark a function for which ONNX has one operation, which its runtimes have a kernel for.

    Args:
        function: of arrays, and of keywords that are numbers. The exporter knows it by its name.
    """

    @functools.wraps(function)
    def run(*arrays, **options):
        if backend() != "onnx":
            return function(*arrays, **options)
        return jax.lax.composite(function, function.__name__)(*arrays, **options)

    return cast(Operation, run)
