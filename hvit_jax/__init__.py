"""hvit_jax: vision transformers with token reduction in JAX."""

from hvit_jax.api import create, load
from hvit_jax.config import MODELS, ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.models.vit import Features, ViT, jit_model
from hvit_jax.reducers import REDUCERS, Reducer, make_reducer
from hvit_jax.version import __version__

__all__ = [
    "MODELS",
    "REDUCERS",
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
