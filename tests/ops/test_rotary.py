"""Rotary positions: places of patches, and which channels turn by which angle."""

import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.config import Rope
from hvit_jax.ops.rotary import grid_coordinates, rotate

DINOV3 = Rope((1.0, 10.0))
EVA = Rope((1.0, 10.0), "grid", (16, 8), interleaved=True)


def turned(pairs, angles):
    """Turn pairs of numbers by angles."""
    return [
        (a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle))
        for (a, b), angle in zip(pairs, angles, strict=True)
    ]


def test_centred_coordinates_by_hand():
    """Centres of patches on axes from -1 to 1, times 2 pi."""
    rows, columns = [-0.5, 0.5], [-2 / 3, 0, 2 / 3]
    expected = [[y, x] for y in rows for x in columns]
    found = grid_coordinates(DINOV3, (2, 3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 2 * np.pi * np.array(expected), rtol=1e-6)


@pytest.mark.parametrize(
    ("rope", "rows", "columns"),
    [
        (EVA, [0, 8], [0, 2, 4, 6]),
        (Rope((1.0,), "grid", (16, 8), 1.0), [8, 16], [2, 4, 6, 8]),
        (Rope((1.0,), "grid", None, 0.5), [0.5, 1.5], [0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_coordinates_on_the_grid_of_training_by_hand(rope, rows, columns):
    expected = [[y, x] for y in rows for x in columns]
    np.testing.assert_allclose(grid_coordinates(rope, (2, 4)), expected, rtol=1e-6)


def test_periods_of_dinov3():
    np.testing.assert_allclose(Rope.spaced(16).periods, [1, 100**0.25, 10, 100**0.75], rtol=1e-12)


@pytest.mark.parametrize("first_axis", ["y", "x"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_by_hand(interleaved, first_axis):
    rope = Rope((1.0, 10.0), interleaved=interleaved, first_axis=first_axis)
    x = np.arange(1.0, 17).reshape(1, 2, 1, 8)
    y_place, x_place = 0.7, -2.0
    angles = [y_place, y_place / 10, x_place, x_place / 10]
    angles = angles if first_axis == "y" else angles[2:] + angles[:2]
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(4), slice(4, 8))
    patch = x[0, 1, 0]
    expected = np.empty(8)
    expected[first], expected[second] = np.transpose(
        turned(list(zip(patch[first], patch[second], strict=True)), angles)
    )
    places = jnp.array([[[y_place, x_place]]])
    found = np.asarray(rotate(jnp.asarray(x, jnp.float32), places, rope))
    np.testing.assert_array_equal(found[0, 0], x[0, 0], err_msg="a token before the patches")
    np.testing.assert_allclose(found[0, 1, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("rope", [DINOV3, EVA])
def test_products_tell_distances_and_no_places(rope):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 8)), jnp.float32) for _ in range(2))
    products = []
    for shift in (0.0, 1.7):
        places = [jnp.array([[[0.3 + shift, 2.0 - shift]]]), jnp.array([[[shift, 1 - shift]]])]
        turned = (rotate(x, place, rope) for x, place in zip((q, k), places, strict=True))
        products.append(jnp.einsum("bnhd,bnhd->bnh", *turned))
    np.testing.assert_allclose(*products, rtol=1e-5, atol=1e-5)
    assert np.abs(products[0] - jnp.einsum("bnhd,bnhd->bnh", q, k)).max() > 0.1


def test_angles_are_in_float32_whatever_the_tokens_are():
    places = jnp.array([[[100.3, 7.7]]])
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    found, exact = rotate(x, places, DINOV3), rotate(x.astype(jnp.float32), places, DINOV3)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
