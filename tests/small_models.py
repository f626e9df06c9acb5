"""Small models under a method, with weights and pictures that show what it does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hvit_jax.config import Compute, Rope
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.models.vit import jit_model
from hvit_jax.reducers import make_reducer


def with_registers(config, **switches):
    """The same sizes as DINOv3 has them: registers, rotary positions, LayerScale, no head."""
    given = {
        **{"num_classes": 0, "registers": 3, "position_embedding": False, "layer_scale": True},
        **{"rope": Rope.dinov3(config.head_dim), "qkv_bias": "qv", "norm_eps": 1e-5, **switches},
    }
    return dataclasses.replace(config, **given)


def without_class_token(config, **switches):
    """The same sizes as SigLIP has them: no tokens before the patches, MAP, no head."""
    given = {
        **{"num_classes": 0, "class_token": False, "position_prefix": 0, "pool": "map"},
        **{"position_resizing": "bicubic", **switches},
    }
    return dataclasses.replace(config, **given)


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
