"""Rotary positions on a grid of patches (Su et al. 2021, RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hvit_jax.config import Rope
from hvit_jax.ops.precision import accumulator


def grid_coordinates(rope: Rope, grid: tuple[int, int]) -> np.ndarray:
    """Give every patch of a grid its coordinates, in the units of the periods.

    Args:
        rope: where an axis begins and ends.
        grid: rows and columns of patches.

    Returns:
        Float32 array (P, 2), row-major: along the rows' axis, y, and along the columns', x.
    """
    axes = []
    for size, reference in zip(grid, rope.reference or grid, strict=True):
        if rope.coordinates == "centred":
            axes.append(2 * np.pi * (2 * (np.arange(size) + 0.5) / size - 1))
        else:
            axes.append((np.arange(size) + rope.offset) / size * reference)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float32)


def rotate(
    x: Float[Array, "B N H D"], coordinates: Float[Array, "b P 2"], rope: Rope
) -> Float[Array, "B N H D"]:
    """Turn the patches' vectors by the angles of their places; tokens before them stay.

    Args:
        x: queries or keys; the last P tokens are patches.
        coordinates: of each patch token, y and x as `grid_coordinates` gives them; equal for all
            images if b is 1.
        rope: periods, and which channels turn together.

    Returns:
        The turned vectors in the dtype of `x`; angles are computed in float32.
    """
    prefix = x.shape[1] - coordinates.shape[1]
    wide = accumulator(x.dtype)
    axes = coordinates if rope.first_axis == "y" else coordinates[..., ::-1]
    periods = jnp.asarray(np.asarray(rope.periods), wide).reshape(1, 1, 1, -1)
    angles = (axes.astype(wide)[..., None] / periods).reshape(*coordinates.shape[:2], 1, -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    patches = x[:, prefix:].astype(wide)
    if rope.interleaved:
        first, second = patches[..., ::2], patches[..., 1::2]
    else:
        first, second = jnp.split(patches, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if rope.interleaved:
        patches = jnp.stack(turned, axis=-1).reshape(patches.shape)
    else:
        patches = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([x[:, :prefix], patches.astype(x.dtype)], axis=1)
