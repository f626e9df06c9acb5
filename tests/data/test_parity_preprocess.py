"""Prepared pictures against the original's, and sizes that the goldens do not have."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hvit_jax.data.picture import open_picture
from hvit_jax.data.preprocess import normalize, resize_and_crop, resized_size
from hvit_jax.errors import InputError
from hvit_jax.fields import from_json
from hvit_jax.pictures import Preprocessing, crop_share
from tests.golden import Goldens

CASES = [name.rsplit("/", 1) for name in Goldens().preprocess]


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
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
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


FOLDER = Path(__file__).parent
LIBRARIES = np.load(FOLDER / "preprocess_goldens.npz")  # Of timm and transformers; see below.
SETTINGS = json.loads(str(LIBRARIES["settings"]))


@pytest.mark.parametrize("picture", ["landscape.png", "portrait.jpg"])
@pytest.mark.parametrize("case", SETTINGS)
def test_parity_with_timm_and_transformers(case, picture):
    """Their own pixels, for centre, squash and border, squares and a rectangle, both filters."""
    preprocessing = from_json(Preprocessing, SETTINGS[case])
    expected = LIBRARIES[f"{case}/{picture}"]
    image = Image.open(FOLDER.parent / "goldens" / "images" / picture)
    pixels = resize_and_crop(image, expected.shape[:2], preprocessing)
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("case", ["timm_center_100_half", "CLIPImageProcessor_pil"])
def test_parity_normalize_with_other_statistics(case):
    """timm's and transformers' arrays as their models get them, channels first."""
    preprocessing = from_json(Preprocessing, SETTINGS[case])
    pixels = LIBRARIES[f"{case}/landscape.png"]
    images = normalize(pixels, preprocessing.mean, preprocessing.std)
    expected = LIBRARIES[f"{case}/normalised"].transpose(1, 2, 0)
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_torchvisions_resize_256_and_crop_224():
    # 300 x 400 becomes 256 x int(341.33); the crop begins at round(58.5) = 58 and 16.
    image = gradient(400, 300)
    preprocessing = Preprocessing(crop_pct=0.875, interpolation="bilinear")
    resized = np.asarray(image.resize((341, 256), Image.Resampling.BILINEAR))
    pixels = resize_and_crop(image, (224, 224), preprocessing)
    np.testing.assert_array_equal(pixels, resized[16:240, 58:282])


def test_transformers_floors_the_margin():
    # A margin of 7 is cut 3 and 4, where torchvision and timm cut 4 and 3.
    image = gradient(39, 32)
    for rounding, left in (("transformers", 3), ("torchvision", 4), ("timm", 4)):
        pixels = resize_and_crop(image, (32, 32), Preprocessing(rounding=rounding))
        np.testing.assert_array_equal(pixels, np.asarray(image)[:, left : left + 32])


def test_what_no_patch_covers_is_cut_off_below_and_on_the_right():
    """SigLIP SO400M's 384 pixels in patches of 14, here 20 in patches of 9."""
    image = gradient(47, 31)
    for mode in ("center", "squash", "border"):
        whole = Preprocessing(0.9, mode, "timm")
        covered = dataclasses.replace(whole, uncovered=(2, 2))
        expected = resize_and_crop(image, (20, 20), whole)[:18, :18]
        np.testing.assert_array_equal(resize_and_crop(image, (18, 18), covered), expected)


def test_border_shows_the_whole_picture_on_the_mean_colour():
    image = Image.new("RGB", (40, 20), (200, 10, 30))
    preprocessing = Preprocessing(crop_mode="border", mean=(0.5, 0.2, 0.4))
    pixels = resize_and_crop(image, (16, 16), preprocessing)
    assert (pixels[4:12] == [200, 10, 30]).all()
    assert (pixels[:4] == [128, 51, 102]).all() and (pixels[12:] == [128, 51, 102]).all()


def test_crop_share_gives_both_sizes_exactly():
    for kept, resized in ((224, 256), (224, 354), (48, 55), (518, 518), (336, 1018)):
        preprocessing = Preprocessing(crop_pct=crop_share(kept, resized))
        assert resized_size((999, 999), (kept, kept), preprocessing) == (resized, resized)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_pct": 0.0}, "crop_pct must be above 0 and at most 1, got 0"),
        ({"crop_pct": 1.5}, "crop_pct must be above 0 and at most 1, got 1.5"),
        ({"crop_mode": "middle"}, "crop_mode must be one of center, squash, border"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0, got 0"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "mean must be 3 numbers"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**options)
