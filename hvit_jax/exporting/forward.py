"""What is exported: the function from pictures in bytes to logits, and how its batch is named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from hvit_jax.data.preprocess import normalize
from hvit_jax.errors import InputError, first_line
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.parameters import flatten
from hvit_jax.models.vit import ViT
from hvit_jax.pictures import Preprocessing

Weights = dict[str, np.ndarray]


def named_weights(model: ViT) -> Weights:
    """List a model's weights by their paths, in the order in which `forward` takes them."""
    tree = nnx.to_pure_dict(nnx.state(model))
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def forward(
    model: ViT, preprocessing: Preprocessing
) -> Callable[[Sequence[Any], UInt8[Array, "B H W 3"]], Float[Array, "B classes"]]:
    """Make the function: weights, and pictures as `resize_and_crop` prepares them, to logits."""
    with_weights, _ = part_weights(model)

    def run(weights, pixels):
        images = normalize(pixels, preprocessing.mean, preprocessing.std)
        return with_weights(list(weights))(images)

    return run


def pictures(model: ViT, batch: int | None) -> jax.ShapeDtypeStruct:
    """Describe a batch of pictures, of a known number or of any."""
    rows = jax.export.symbolic_shape("b", constraints=["b >= 1"])[0] if batch is None else batch
    return jax.ShapeDtypeStruct((rows, *model.config.image_shape, 3), np.uint8)


@contextlib.contextmanager
def explain_unknown_batch(model: ViT, batch: int | None) -> Iterator[None]:
    """Turn what is raised where a method asks for a batch size that is not known into one line."""
    try:
        yield
    # JAX and methods raise these where a size is asked for that is not known yet.
    except (jax.errors.InconclusiveDimensionOperation, TypeError, InputError) as error:
        if batch is not None:
            raise
        raise InputError(
            f"{model.reducer.name} with these options needs to know the batch size; give it with "
            f"--batch N ({first_line(error)})"
        ) from error
