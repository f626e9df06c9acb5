"""Learned position embeddings for another grid of patches."""

from __future__ import annotations

import numpy as np

from hvit_jax.ops.resizing import resizing_matrix


def resize_positions(
    positions: np.ndarray,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    rule: str,
    prefix: int,
) -> np.ndarray:
    """Fit a table of position embeddings to another grid; entries before the patches are kept.

    Args:
        positions: float32 array (prefix + h * w, C), the grid row-major.
        grid: its rows and columns.
        new_grid: rows and columns wanted.
        rule: a name in `hvit_jax.config.RESIZING`; see `hvit_jax.ops.resizing`.
        prefix: entries before the patches.

    Returns:
        Float32 array (prefix + new h * new w, C).

    Raises:
        InputError: for an unknown rule.
    """
    if grid == new_grid:
        return positions
    cells = positions[prefix:].reshape(*grid, -1).astype(np.float64)
    rows, columns = (resizing_matrix(*sizes, rule) for sizes in zip(grid, new_grid, strict=True))
    resized = np.einsum("ih,jw,hwc->ijc", rows, columns, cells, optimize=True)
    flat = resized.reshape(-1, positions.shape[-1])
    return np.concatenate([positions[:prefix], flat.astype(np.float32)])
