"""A model's parameters as one plain tree, whatever method and segments it runs with.

The tree nests dicts as the model nests modules, except that `blocks` holds the parameters of all
blocks stacked along a first axis of length `depth`. Checkpoints store this tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.float8 import round_blocks
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.ops.float8 import check_device

Tree = dict[str, Any]


def get_parameters(model: ViT) -> Tree:
    """Gather a model's parameters; the blocks of all segments are joined into one stack."""
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    segments = tree.pop("segments")
    stacks = [segments[index] for index in sorted(segments, key=int)]
    tree["blocks"] = jax.tree.map(lambda *leaves: jax.numpy.concatenate(leaves), *stacks)
    return tree


def build_model(
    config: ViTConfig,
    reducer: Reducer,
    parameters: Tree,
    compute: Compute = Compute(),
    *,
    gather_weights: Callable[[Any], Any] | None = None,
) -> ViT:
    """Make a model around given parameters, split into its segments once.

    Args:
        config: the model's sizes.
        reducer: the method.
        parameters: a tree as `abstract_parameters` describes.
        compute: how the model is computed.
        gather_weights: as for `ViT`.

    Returns:
        The model; each parameter has been converted to the dtype that the model stores it in.

    Raises:
        InputError: if the method's options do not fit the model, or the device has no float8.
    """
    if compute.float8:
        check_device()
        parameters = _in_float8(parameters)
    options = {"compute": compute, "gather_weights": gather_weights}
    model = nnx.eval_shape(lambda: ViT(config, reducer, rngs=nnx.Rngs(0), **options))
    graph, state = nnx.split(model)
    tree = {name: leaf for name, leaf in parameters.items() if name != "blocks"}
    tree["segments"], start = {}, 0
    for index, (_, count) in enumerate(model.runs()):
        cut = slice(start, start + count)
        tree["segments"][index] = jax.tree.map(
            lambda leaf, cut=cut: leaf[cut], parameters["blocks"]
        )
        start += count
    stored = jax.tree.map(
        lambda leaf, like: jax.numpy.asarray(leaf, like.dtype), tree, nnx.to_pure_dict(state)
    )
    nnx.replace_by_pure_dict(state, stored)
    return nnx.merge(graph, state)


def _in_float8(parameters: Tree) -> Tree:
    """Round the linear layers of the model's blocks, and of a decoder's if it has any."""
    decoder = parameters.get("decoder", {})
    if "blocks" in decoder:
        parameters = {**parameters, "decoder": _in_float8(decoder)}
    return {**parameters, "blocks": round_blocks(parameters["blocks"])}


def init_parameters(config: ViTConfig, seed: int) -> Tree:
    """Draw random float32 parameters; the same seed gives the same ones for every method.

    Args:
        config: the model's sizes.
        seed: of the random numbers.
    """
    return _initial(config, jax.random.key(seed))


def abstract_parameters(config: ViTConfig) -> Tree:
    """Describe the parameters' tree by shapes and float32 dtypes, without making it."""
    return jax.eval_shape(lambda key: _initial(config, key), jax.random.key(0))


# Compiled once a configuration: compiling the random numbers takes seconds.
@functools.partial(jax.jit, static_argnums=0)
def _initial(config: ViTConfig, key: jax.Array) -> Tree:
    return get_parameters(ViT(config, Reducer(), rngs=nnx.Rngs(key)))


def flatten(tree: Tree) -> dict[str, Any]:
    """Name every leaf of a tree by its path, joined with slashes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(str(step.key) for step in path): leaf for path, leaf in leaves}


def count_parameters(tree: Tree) -> int:
    """Count the numbers in a tree of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
