"""A model as compiled programs, whose weights are arguments and not constants in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import jax
from flax import nnx
from jaxtyping import Array

from hvit_jax.models.vit import ViT
from hvit_jax.ops.platform import compiler_options

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def part_weights(model: ViT) -> tuple[Callable[[list[Array]], ViT], list[Array]]:
    """Part a model from its weights, to compile it as a function of them.

    They are a plain list: a call handles the 300 arrays of an unrolled ViT-L/16 in 0.2 ms, and
    those of nnx's state in 1.1 ms.

    Returns:
        A function that makes the model of its weights, and the weights.
    """
    graph, state = nnx.split(model)
    weights, structure = jax.tree.flatten(state)
    return lambda weights: nnx.merge(graph, structure.unflatten(weights)), weights


def _compiled(
    output: Callable[Concatenate[ViT, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """Make the method of `CompiledModel` that runs an output of `ViT`'s."""

    @functools.wraps(output)
    def run(self, images, draws=None):
        return self.run(self._weights, images, draws, output.__name__)

    return cast(Any, run)


class CompiledModel:
    """A model whose outputs are compiled, each when it is first asked for and once a batch shape.

    `jit_model` makes it. Calling it, and its methods, take and return what those of `ViT` do.

    Attributes:
        config: the model's sizes.
        reducer: its method.
        run: the compiled function of weights, images, draws and the name of an output.
    """

    def __init__(self, model: ViT):
        """Part the model from its weights; see `jit_model`."""
        self.config, self.reducer = model.config, model.reducer
        with_weights, self._weights = part_weights(model)

        @functools.partial(jax.jit, static_argnums=3, compiler_options=compiler_options())
        def run(weights, images, draws, output: str):
            return getattr(with_weights(weights), output)(images, draws=draws)

        self.run = run

    __call__ = _compiled(ViT.__call__)
    classify = _compiled(ViT.classify)
    features = _compiled(ViT.features)
    dense_features = _compiled(ViT.dense_features)
    masks = _compiled(ViT.masks)
    pooled = _compiled(ViT.pooled)
    image_embedding = _compiled(ViT.image_embedding)
    tokens = _compiled(ViT.tokens)


def jit_model(model: ViT) -> CompiledModel:
    """Compile a model: all that it computes of images.

    A call without this runs operation by operation, which is a hundred times slower and more.
    Weights are arguments of the compiled programs, not constants in them.

    Args:
        model: a model; later changes to it are not seen.

    Returns:
        What is called like the model.
    """
    return CompiledModel(model)
