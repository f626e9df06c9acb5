"""Prepared pictures against the original's, and sizes that the goldens do not have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hvit_jax.data.folder import open_picture
from hvit_jax.data.preprocess import normalize, resize_and_crop
from tests.golden import Goldens

CASES = [name.rsplit("/", 1) for name in Goldens().preprocess.files]


@pytest.mark.parametrize(("file", "resolution"), CASES)
def test_parity_preprocess(goldens, file, resolution):
    image = open_picture(goldens.folder / "images" / file, file)
    pixels = resize_and_crop(image, (int(resolution), int(resolution)))
    assert pixels.dtype == np.uint8
    expected = goldens.preprocess[f"{file}/{resolution}"]
    np.testing.assert_allclose(normalize(pixels), expected, atol=2e-6, rtol=0)


def test_normalize_uses_imagenet_statistics():
    pixels = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    expected = [[[-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]]]
    expected[0].append([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])
    np.testing.assert_allclose(normalize(pixels), expected, atol=1e-6)


def gradient(width, height):
    """A picture whose red tells the column and whose green tells the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()[None]
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def test_same_shape_is_only_resized():
    image = gradient(80, 60)
    expected = np.asarray(image.resize((32, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_and_crop(image, (24, 32)), expected)


def test_wide_picture_loses_its_sides():
    # 100 x 40 becomes 60 x 24 to cover 24 x 32; columns 14 to 45 stay.
    image = gradient(100, 40)
    resized = np.asarray(image.resize((60, 24), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_and_crop(image, (24, 32)), resized[:, 14:46])


def test_tall_picture_loses_top_and_bottom():
    # 40 x 100 becomes 32 x 80; rows 28 to 51 stay.
    image = gradient(40, 100)
    resized = np.asarray(image.resize((32, 80), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize_and_crop(image, (24, 32)), resized[28:52])


def test_odd_margin_rounds_half_to_even():
    # A margin of 5 is cut 2 and 3, one of 7 is cut 4 and 3, as Python rounds 2.5 and 3.5.
    for width, left in ((37, 2), (39, 4)):
        image = gradient(width, 32)
        pixels = np.asarray(image)[:, left : left + 32]
        np.testing.assert_array_equal(resize_and_crop(image, (32, 32)), pixels)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_any_size_fills_any_resolution(width, height, rows, columns):
    pixels = resize_and_crop(Image.new("RGB", (width, height), (10, 200, 30)), (rows, columns))
    assert pixels.shape == (rows, columns, 3)
    # A plain colour has no edges: a black margin would show that the picture did not cover it all.
    assert (pixels == [10, 200, 30]).all()
