"""Resizing of maps: every library's own rule, each a matrix along one axis.

- `swag`: PyTorch's bicubic interpolation with align_corners=True, as SWAG resizes positions.
- `bicubic`: the same kernel between the centres of cells, as transformers resizes them.
- `dinov2`: as `bicubic`, with a scale that is off by 0.1 patches, as DINOv2 resizes them.
- `bicubic_antialias`: the kernel widened where the grid shrinks, as timm and OpenCLIP do.
- `bilinear_antialias`: that with a triangle for a kernel, as SigLIP 2 NaFlex does.
- `bilinear`: between the two nearest centres, as timm resizes FlexiViT's positions, Segmenter its
  own, and heads their maps.
- `bilinear_corners`: the same with align_corners=True, as DPT enlarges its maps.

`jax.image.resize` has another cubic kernel, and antialiases.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hvit_jax.errors import unknown
from hvit_jax.ops.precision import accurate_einsum

Weights = Callable[[np.ndarray], np.ndarray]


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Weigh taps as Keys' cubic kernel does; PyTorch's parameter is -0.75, Pillow's -0.5."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x - 4
    return np.where(x <= 1, near, np.where(x < 2, a * far, 0.0))


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0)


def _interpolated(places: np.ndarray, size: int, *, weights: Weights, support: int) -> np.ndarray:
    """Interpolate at places between entries; taps beyond the edge fall on the edge entry."""
    matrix = np.zeros((len(places), size))
    for offset in range(1 - support, support + 1):
        taps = np.floor(places).astype(int) + offset
        rows = np.arange(len(places))
        np.add.at(matrix, (rows, taps.clip(0, size - 1)), weights(places - taps))
    return matrix


def _antialiased(size: int, out: int, *, weights: Weights, support: int) -> np.ndarray:
    """Weigh all entries under a kernel that is as wide as the larger of the two cells."""
    scale = size / out
    factor = max(scale, 1.0)
    matrix = np.zeros((out, size))
    for place in range(out):
        centre = scale * (place + 0.5)
        first = max(int(centre - support * factor + 0.5), 0)
        taps = np.arange(first, min(int(centre + support * factor + 0.5), size))
        row = weights((taps - centre + 0.5) / factor)
        matrix[place, taps] = row / row.sum()
    return matrix


def resizing_matrix(size: int, out: int, rule: str) -> np.ndarray:
    """Write a rule along one axis as a matrix.

    Args:
        size: entries before.
        out: entries after.
        rule: its name.

    Returns:
        Float64 weights of shape (out, size); rows sum to 1.

    Raises:
        InputError: for an unknown rule.
    """
    steps = np.arange(out)
    corners = steps * ((size - 1) / (out - 1) if out > 1 else 0.0)
    centres = (steps + 0.5) * (size / out) - 0.5
    rules: dict[str, Callable[[], np.ndarray]] = {
        "swag": lambda: _interpolated(corners, size, weights=_cubic, support=2),
        "bicubic": lambda: _interpolated(centres, size, weights=_cubic, support=2),
        "dinov2": lambda: _interpolated(
            (steps + 0.5) * (size / (out + 0.1)) - 0.5, size, weights=_cubic, support=2
        ),
        "bicubic_antialias": lambda: _antialiased(
            size, out, weights=lambda distance: _cubic(distance, -0.5), support=2
        ),
        "bilinear_antialias": lambda: _antialiased(size, out, weights=_triangle, support=1),
        "bilinear": lambda: _interpolated(centres, size, weights=_triangle, support=1),
        "bilinear_corners": lambda: _interpolated(corners, size, weights=_triangle, support=1),
    }
    if rule not in rules:
        raise unknown("rule of resizing", rule, rules)
    return rules[rule]()


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
        rule: see `resizing_matrix`; a name in `hvit_jax.config.RESIZING`.
        prefix: entries before the patches.

    Returns:
        Float32 array (prefix + new h * new w, C).
    """
    if grid == new_grid:
        return positions
    cells = positions[prefix:].reshape(*grid, -1).astype(np.float64)
    rows, columns = (resizing_matrix(*sizes, rule) for sizes in zip(grid, new_grid, strict=True))
    resized = np.einsum("ih,jw,hwc->ijc", rows, columns, cells, optimize=True)
    flat = resized.reshape(-1, positions.shape[-1])
    return np.concatenate([positions[:prefix], flat.astype(np.float32)])


def resize_map(
    x: Float[Array, "B h w C"], size: tuple[int, int], rule: str = "bilinear"
) -> Float[Array, "B H W C"]:
    """Resize maps along both axes.

    Args:
        x: maps.
        size: rows and columns wanted.
        rule: see `resizing_matrix`.
    """
    if x.shape[1:3] == size:
        return x
    rows, columns = (
        jnp.asarray(resizing_matrix(*sizes, rule), x.dtype)
        for sizes in zip(x.shape[1:3], size, strict=True)
    )
    return accurate_einsum("Hh,Ww,bhwc->bHWc", rows, columns, x).astype(x.dtype)
