"""hvit_jax: vision transformers with token reduction in JAX."""

import importlib
from typing import Any

from hvit_jax.api import create, load
from hvit_jax.config import MODELS, Compute, ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.models.vit import Features, ViT, jit_model
from hvit_jax.reducers import REDUCERS, Reducer, make_reducer
from hvit_jax.version import __version__

__all__ = [
    "MODELS",
    "REDUCERS",
    "Compute",
    "Features",
    "InputError",
    "Reducer",
    "ViT",
    "ViTConfig",
    "__version__",
    "count_flops",
    "create",
    "jit_model",
    "load",
    "make_reducer",
]

# Imported when they are asked for, such as `hvit_jax.evaluation.evaluate`.
_TOOLS = (
    "calibration",
    "convert",
    "data",
    "demo",
    "distributed",
    "evaluation",
    "exporting",
    "profiling",
    "published",
    "sweeping",
    "training",
    "visualization",
)


def __getattr__(name: str) -> Any:
    if name in _TOOLS:
        return importlib.import_module(f"hvit_jax.{name}")
    raise AttributeError(f"module 'hvit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TOOLS})
