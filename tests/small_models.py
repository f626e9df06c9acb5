"""Small models under a method, with weights and pictures that show what it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hvit_jax.config import Compute, Rope, ViTConfig
from hvit_jax.models.compiled import jit_model
from hvit_jax.models.parameters import abstract_parameters, build_model, flatten, init_parameters
from hvit_jax.reducers import make_reducer


def with_registers(config, **switches):
    """The same sizes as DINOv3 has them: registers, rotary positions, LayerScale, no head."""
    given = {
        **{"num_classes": 0, "registers": 3, "position_embedding": False, "layer_scale": True},
        **{"rope": Rope.spaced(config.head_dim), "qkv_bias": "qv", "norm_eps": 1e-5, **switches},
    }
    return dataclasses.replace(config, **given)


def without_class_token(config, **switches):
    """The same sizes as SigLIP has them: no tokens before the patches, MAP, no head."""
    given = {
        **{"num_classes": 0, "class_token": False, "position_prefix": 0, "pool": "map"},
        **{"position_resizing": "bicubic", **switches},
    }
    return dataclasses.replace(config, **given)


def _kind(**switches):
    return dataclasses.replace(SMALL, **switches)


# Compiled in a second, on a grid that is not square.
SMALL = ViTConfig((48, 64), patch_size=8, depth=4, width=32, heads=2, mlp_width=64, num_classes=5)
# Backbones that differ in what a method may trip over; 0 to 5 tokens stand before the patches.
KINDS = {
    "swag": SMALL,
    "distilled": _kind(distillation_token=True, position_prefix=2, pool="two heads"),
    "dinov2": _kind(registers=4, layer_scale=True, pool="cls+avg", position_resizing="dinov2"),
    "dinov3": with_registers(SMALL, gated=True, activation="silu", pool="avg"),
    "siglip": without_class_token(SMALL, activation="gelu_tanh"),
    "gap": _kind(
        **{"class_token": False, "registers": 3, "position_prefix": 0, "layer_scale": True},
        **{"qkv_bias": "none", "final_norm": False, "pool": "avg", "pooled_norm": True},
        position_resizing="bicubic_antialias",
    ),
    "clip": _kind(
        **{"patch_bias": False, "pre_norm": True, "activation": "quick_gelu", "norm_eps": 1e-5},
        **{"num_classes": 0, "projection": 6, "position_resizing": "bicubic"},
    ),
    "perception": _kind(
        rope=Rope((1.0, 2.5, 6.0, 15.0), "grid", (5, 7), 1.0, "x", True),
        **{"patch_bias": False, "pre_norm": True, "qk_norm": True, "mlp_norm": True},
        **{"pool": "map", "pool_heads": 4, "pool_mlp_width": 40, "pool_prefix": True},
        position_resizing="bicubic_antialias",
    ),
}


def loud_parameters(config, seed=0):
    """Random weights without a 0 or 1 that would hide an error: norms, LayerScale, all biases."""
    rng, drawn = np.random.default_rng(seed), {}
    for path, leaf in flatten(abstract_parameters(config)).items():
        numbers = rng.normal(size=leaf.shape)
        if path.endswith("kernel"):
            # Tokens differ in what they look at.
            numbers *= (2 if "in_proj" in path else 1) / leaf.shape[-2] ** 0.5
        elif path.endswith("scale"):
            numbers = 1 + 0.3 * numbers
        elif path.endswith("bias"):
            numbers *= 0.3
        elif path.startswith("blocks/ls_"):
            numbers = 0.6 + 0.3 * numbers
        if path == "blocks/in_proj/bias" and config.qkv_bias == "qv":
            numbers[:, config.width : 2 * config.width] = 0
        drawn[path] = np.float32(numbers)
    return _nested(drawn)


def _nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for each in folders:
            place = place.setdefault(each, {})
        place[name] = leaf
    return tree


def noise(config):
    """Three pictures."""
    shape = (3, *config.image_shape, 3)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def contrasts(config):
    """Three pictures, from faint to strong."""
    return noise(config) * jnp.array([0.3, 1.0, 3.0])[:, None, None, None]


def sharp_parameters(config, factor):
    """Random weights with large queries and keys, so that tokens differ in what they look at."""
    parameters = init_parameters(config, 3)
    kernel = parameters["blocks"]["in_proj"]["kernel"]
    parameters["blocks"]["in_proj"]["kernel"] = factor * kernel
    return parameters


def build(config, parameters, *, method, dtype="float32", unroll=False, **options):
    reducer = make_reducer(method, **options)
    return build_model(config, reducer, parameters, Compute(dtype=dtype, unroll=unroll))


def classify(model, images):
    return jit_model(model).classify(images)


def compute_features(model, images):
    return jit_model(model).features(images)


def compute_dense_features(model, images):
    return jit_model(model).dense_features(images)


def frozen(model):
    """Silence both branches of every block, so that a token's value tells which patch it is."""
    for blocks in model.segments:
        for layer in (blocks.out_proj, blocks.linear_2):
            layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
            layer.bias[...] = jnp.zeros_like(layer.bias[...])
    return model


def block_of(model, index):
    """Take one block out of a model made with `unroll=True`."""
    graph, weights = nnx.split(model.segments[index])
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], weights))
