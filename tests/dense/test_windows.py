"""Pictures become windows, and windows' maps one map, as SPEC and the original codes say."""

import dataclasses

import numpy as np
import pytest

import hvit_jax
from hvit_jax.config import Decoder
from hvit_jax.dense.windows import Layout, resize_pixels
from hvit_jax.errors import InputError
from hvit_jax.pictures import Windows

CONFIG = hvit_jax.ViTConfig(
    (32, 32), 8, depth=1, width=16, heads=2, mlp_width=32, decoder=Decoder("linear", 3)
)
TAPS = dataclasses.replace(CONFIG, decoder=Decoder("bn_linear", 3, taps=(0,)))


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("short", "long", "scale", "size", "scaled"),
    [
        (640, 2560, 1.0, (512, 683), (640, 854)),
        (640, 2560, 1.0, (300, 1500), (512, 2560)),
        (1024, 2048, 1.0, (1024, 2048), (1024, 2048)),
        (520, 4160, 0.75, (500, 375), (520, 390)),
        (0, None, 1.0, (37, 41), (37, 41)),
        (0, None, 0.5, (37, 41), (19, 21)),
    ],
)
def test_size_that_pictures_are_scaled_to(short, long, scale, size, scaled):
    layout = Layout((32, 32), (32, 32), short, long)
    assert layout.scaled_size(size, scale) == scaled


def test_bilinear_without_antialiasing():
    ramp = np.arange(4, dtype=np.uint8)[:, None, None] * np.full((1, 1, 3), 60, np.uint8)
    shrunk = resize_pixels(ramp, (2, 1))
    np.testing.assert_allclose(shrunk[:, 0, 0], [30, 150])  # Only the two nearest of each.
    grown = resize_pixels(ramp, (8, 1))[:, 0, 0]
    np.testing.assert_allclose(grown, [0, 15, 45, 75, 105, 135, 165, 180])


def test_windows_reach_the_edges():
    layout = Layout.of(CONFIG, Windows(stride=20))
    assert layout.starts((32, 75)) == ((0,), (0, 20, 40, 43))
    assert layout.starts((52, 72)) == ((0, 20), (0, 20, 40))
    view = layout.view(noise(52, 75), (0.5,) * 3)
    assert layout.count(view) == len(list(layout.cut(view))) == 8


def test_windows_are_averaged():
    """Maps that are the number of their window: the mean of the windows over each pixel."""
    layout = Layout((32, 32), (20, 20))
    view = layout.view(noise(32, 52), (0.5,) * 3)
    maps = np.float32([1, 3]).reshape(2, 1, 1, 1) * np.ones((2, 4, 4, 1), np.float32)
    rows, columns = layout.matrices(view, (4, 4), (32, 52))
    found = np.einsum("yi,xj,ijn->yxn", rows, columns, layout.assemble(view, maps))
    expected = np.repeat([1.0, 2.0, 3.0], (20, 12, 20))
    np.testing.assert_allclose(found[..., 0], np.tile(expected, (32, 1)), atol=1e-6)
    mirrored = dataclasses.replace(view, mirrored=True)
    _, columns = layout.matrices(mirrored, (4, 4), (32, 52))
    found = np.einsum("yi,xj,ijn->yxn", rows, columns, layout.assemble(mirrored, maps))
    np.testing.assert_allclose(found[0, :, 0], expected[::-1], atol=1e-6)


def test_small_pictures_are_enlarged_or_padded():
    mean, small = (0.5, 0.25, 0.75), noise(16, 20)
    view = Layout.of(CONFIG, Windows()).view(small, mean)
    assert view.pixels.shape == (32, 40, 3) and view.pixels.dtype == np.float32
    assert view.shown == (32, 40)
    view = Layout.of(CONFIG, Windows(small="pad")).view(small, mean)
    assert view.pixels.shape == (32, 32, 3) and view.shown == (16, 20)
    np.testing.assert_array_equal(view.pixels[:16, :20], small)
    np.testing.assert_allclose(view.pixels[20, 3], 255 * np.array(mean))


def test_every_scale_is_seen_mirrored_too():
    picture = noise(40, 64)
    views = Layout.of(CONFIG, Windows()).views(picture, (0.5,) * 3, (1.0, 2.0), flip=True)
    shapes = [view.pixels.shape[:2] for view in views]
    assert shapes == [(40, 64), (40, 64), (80, 128), (80, 128)]
    assert [view.mirrored for view in views] == [False, True, False, True]
    np.testing.assert_array_equal(views[3].pixels[:, ::-1], views[2].pixels)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (Windows(window=30), "--window 30 is not a multiple of the patch size 8; .* that is: 32"),
        (Windows(window=(32, 3)), "--window 3 is not a multiple .*the nearest that is: 8"),
        (Windows(stride=33), "--stride 33 leaves pixels between windows of 32; give at most 32"),
    ],
)
def test_windows_that_do_not_fit(windows, message):
    with pytest.raises(InputError, match=message):
        Layout.of(CONFIG, windows)


def test_heads_on_taps_take_any_window():
    layout = Layout.of(TAPS, Windows(window=30))
    assert layout.resolution(TAPS.patch_size) == (32, 32)
    with pytest.raises(InputError, match="has no decoder"):
        Layout.of(dataclasses.replace(CONFIG, decoder=None), Windows())
