"""hvit_jax: vision transformers with token reduction in JAX."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from hvit_jax.errors import InputError
from hvit_jax.version import __version__

if TYPE_CHECKING:
    from hvit_jax.api import create, load
    from hvit_jax.architectures import MODELS
    from hvit_jax.config import Compute, ViTConfig
    from hvit_jax.costs import count_flops
    from hvit_jax.data.preprocess import normalize
    from hvit_jax.models.compiled import jit_model
    from hvit_jax.models.vit import Features, ViT
    from hvit_jax.reducers import REDUCERS, Reducer, chain, make_reducer

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
    "chain",
    "count_flops",
    "create",
    "jit_model",
    "load",
    "make_reducer",
    "normalize",
]

# Where names lie that are imported when they are asked for: JAX takes seconds.
_PLACES = {
    "api": ("create", "load"),
    "architectures": ("MODELS",),
    "config": ("Compute", "ViTConfig"),
    "costs": ("count_flops",),
    "data.preprocess": ("normalize",),
    "models.compiled": ("jit_model",),
    "models.vit": ("Features", "ViT"),
    "reducers": ("REDUCERS", "Reducer", "chain", "make_reducer"),
}
_PARTS = tuple(part.name for part in pkgutil.iter_modules(__path__) if part.name != "__main__")


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(f"hvit_jax.{place}"), name)
    if name in _PARTS:
        return importlib.import_module(f"hvit_jax.{name}")
    raise AttributeError(f"module 'hvit_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
