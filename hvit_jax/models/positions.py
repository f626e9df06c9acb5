"""Position embeddings for another grid of patches."""

from __future__ import annotations

import numpy as np

_A = -0.75  # the cubic kernel's parameter in PyTorch


def _cubic(distance: np.ndarray) -> np.ndarray:
    x = np.abs(distance)
    near = ((_A + 2) * x - (_A + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x - 4
    return np.where(x <= 1, near, np.where(x < 2, _A * far, 0.0))


def bicubic_matrix(size: int, out: int) -> np.ndarray:
    """PyTorch's bicubic interpolation with align_corners=True along one axis, as a matrix.

    Args:
        size: entries before.
        out: entries after.

    Returns:
        Float64 weights of shape (out, size). Taps beyond the edge fall on the edge entry.
    """
    places = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0.0)
    matrix = np.zeros((out, size))
    for offset in range(-1, 3):
        taps = np.floor(places).astype(int) + offset
        np.add.at(matrix, (np.arange(out), taps.clip(0, size - 1)), _cubic(places - taps))
    return matrix


def resize_positions(
    positions: np.ndarray, grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """Resize position embeddings bicubically; the CLS entry is kept.

    Args:
        positions: float32 array (1 + h * w, C), CLS first, then the grid row-major.
        grid: its rows and columns.
        new_grid: rows and columns wanted.

    Returns:
        Float32 array (1 + new h * new w, C).
    """
    if grid == new_grid:
        return positions
    cells = positions[1:].reshape(*grid, -1).astype(np.float64)
    rows, columns = (bicubic_matrix(*sizes) for sizes in zip(grid, new_grid, strict=True))
    resized = np.einsum("ih,jw,hwc->ijc", rows, columns, cells, optimize=True)
    flat = resized.reshape(-1, positions.shape[-1])
    return np.concatenate([positions[:1], flat.astype(np.float32)])
