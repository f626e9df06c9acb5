"""A model as a serialised program: uint8 pictures in, logits out."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import export
from jaxtyping import Array, Float, UInt8

from hvit_jax.data.preprocess import normalize
from hvit_jax.errors import InputError, first_line
from hvit_jax.exporting.config import PLATFORMS
from hvit_jax.models.parameters import flatten
from hvit_jax.models.vit import ViT
from hvit_jax.ops.platform import compiled_for

MOST_BYTES = 2**31  # of a FlatBuffer
Weights = dict[str, np.ndarray]


def weights_of(model: ViT) -> Weights:
    """Name a model's weights, as the model with its segments stores them."""
    tree = nnx.to_pure_dict(nnx.state(model))
    return {name: np.asarray(leaf) for name, leaf in flatten(tree).items()}


def export_program(
    model: ViT, weights: Weights, *, platform: str, batch: int | None, inside: bool
) -> tuple[bytes, int]:
    """Export a model's forward pass, from pictures as `resize_and_crop` prepares them.

    Args:
        model: a model whose attention is "xla": programs with cuDNN's calls cannot be exported.
        weights: from `weights_of`.
        platform: one of `PLATFORMS`; this machine needs not have it.
        batch: pictures at once; None for any number.
        inside: whether the program holds the weights; otherwise they are its first argument.

    Returns:
        The program, which takes a dictionary of weights (empty if they are inside) and pictures
        (B, H, W, 3) in uint8, and the version of its calling convention.

    Raises:
        InputError: if the method needs to know the batch, or the weights are too large.
    """
    size = sum(array.nbytes for array in weights.values())
    if inside and size >= MOST_BYTES:
        raise InputError(
            f"{size / 1e9:.1f} GB of weights do not fit inside a program, which may have "
            f"{MOST_BYTES / 1e9:.1f} GB; use --weights beside"
        )
    graph, state = nnx.split(model)
    structure = jax.tree.structure(nnx.to_pure_dict(state))
    names = list(weights)

    def classify(
        given: dict[str, Array], pixels: UInt8[Array, "B H W 3"]
    ) -> Float[Array, "B classes"]:
        arrays = weights if inside else given
        tree = structure.unflatten([jax.numpy.asarray(arrays[name]) for name in names])
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, tree)
        return nnx.merge(graph, filled)(normalize(pixels))

    described = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in weights.items()}
    exported = _export(classify, {} if inside else described, model, platform, batch)
    return bytes(exported.serialize()), exported.calling_convention_version


def _export(function: Any, weights: Any, model: ViT, platform: str, batch: int | None) -> Any:
    rows = export.symbolic_shape("b", constraints=["b >= 1"])[0] if batch is None else batch
    pixels = jax.ShapeDtypeStruct((rows, *model.config.image_shape, 3), np.uint8)
    try:
        with compiled_for(PLATFORMS[platform]):
            return export.export(jax.jit(function), platforms=[platform])(weights, pixels)
    # JAX and methods raise these where a size is asked for that is not known yet.
    except (jax.errors.InconclusiveDimensionOperation, TypeError, InputError) as error:
        if batch is not None:
            raise
        raise InputError(
            f"{model.reducer.name} with these options needs to know the batch size; give it with "
            f"--batch N ({first_line(error)})"
        ) from error
