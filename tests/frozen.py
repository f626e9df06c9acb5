"""Models whose blocks change no token, and single blocks taken out of a model."""

import jax
import jax.numpy as jnp
from flax import nnx


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
