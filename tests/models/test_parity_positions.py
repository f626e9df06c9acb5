"""Position embeddings on other grids, against PyTorch's bicubic interpolation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvit_jax.ops.resizing import resize_positions
from tests.golden import Goldens

CASES = Goldens().cases("pos_")


def square(entries):
    side = int(np.sqrt(entries - 1))
    assert side * side == entries - 1
    return side, side


@pytest.mark.parametrize("name", CASES)
def test_parity_positions(goldens, name):
    case = goldens.case(name)
    before, after = case["inp"][:, 0], case["out"][:, 0]
    resized = resize_positions(
        before, square(len(before)), square(len(after)), rule="swag", prefix=1
    )
    np.testing.assert_allclose(resized, after, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(resized[0], before[0])


def test_the_same_grid_keeps_every_bit():
    positions = np.random.default_rng(0).normal(size=(13, 5)).astype(np.float32)
    np.testing.assert_array_equal(
        resize_positions(positions, (3, 4), (3, 4), rule="swag", prefix=1), positions
    )


# How PyTorch is asked for the rules that it has.
TORCH = {
    "swag": {"mode": "bicubic", "align_corners": True},
    "bicubic": {"mode": "bicubic"},
    "bicubic_antialias": {"mode": "bicubic", "antialias": True},
    "bilinear": {"mode": "bilinear"},
    "bilinear_antialias": {"mode": "bilinear", "antialias": True},
}


# Of one column, PyTorch's antialiased bilinear kernel gives the first row for all.
SIZES = {"grid": st.tuples(st.integers(1, 9), st.integers(2, 9))}
SIZES["new"] = st.tuples(st.integers(1, 12), st.integers(2, 12))


@pytest.mark.parametrize("rule", TORCH)
@settings(max_examples=40, deadline=None)
@given(**SIZES)
def test_parity_positions_with_torch_on_any_grid(rule, grid, new):
    cells = np.random.default_rng(7).normal(size=(*grid, 3)).astype(np.float32)
    positions = np.concatenate([np.ones((1, 3), np.float32), cells.reshape(-1, 3)])
    channels_first = torch.from_numpy(cells).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(channels_first, size=new, **TORCH[rule])
    resized = resize_positions(positions, grid, new, rule=rule, prefix=1)
    expected = expected[0].permute(1, 2, 0).reshape(-1, 3).numpy()
    np.testing.assert_allclose(resized[1:], expected, atol=2e-6, rtol=0)
    np.testing.assert_array_equal(resized[0], 1)


@settings(max_examples=40, deadline=None)
@given(grid=st.tuples(*[st.integers(2, 9)] * 2), new=st.tuples(*[st.integers(1, 12)] * 2))
def test_parity_positions_with_dinov2s_scale(grid, new):
    """DINOv2 asks for a scale that is 0.1 patches too large, so that PyTorch rounds it down."""
    cells = np.random.default_rng(7).normal(size=(*grid, 3)).astype(np.float32)
    channels_first = torch.from_numpy(cells).permute(2, 0, 1)[None]
    scale = tuple((side + 0.1) / before for side, before in zip(new, grid, strict=True))
    expected = torch.nn.functional.interpolate(channels_first, scale_factor=scale, mode="bicubic")
    resized = resize_positions(cells.reshape(-1, 3), grid, new, rule="dinov2", prefix=0)
    if grid != new:
        expected = expected[0].permute(1, 2, 0).reshape(-1, 3).numpy()
        np.testing.assert_allclose(resized, expected, atol=3e-6, rtol=0)
