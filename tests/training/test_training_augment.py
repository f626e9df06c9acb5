"""RandAugment's operations, mixup and cutmix, by values that can be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hvit_jax.training.augment import OPERATIONS, mix, rand_augment

COLUMNS = np.broadcast_to(np.arange(10, dtype=np.uint8)[None, :, None] * 20, (10, 10, 3))
PICTURE = Image.fromarray(COLUMNS)
KEY = jax.random.key(0)


def row_of(name, share):
    """Apply an operation to columns of 0, 20, ..., 180, and give the first row's red."""
    return np.asarray(OPERATIONS[name](PICTURE, share))[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("name", "share", "row"),
    [
        ("identity", 1, range(0, 200, 20)),
        ("translate_x", 0.5, [0, 0, *range(0, 160, 20)]),  # int(10 * 150 / 331 / 2)
        ("translate_x", -0.5, [*range(40, 200, 20), 0, 0]),
        ("translate_y", 1, [0] * 10),
        ("brightness", -1, range(0, 20, 2)),
        ("brightness", 1, [0, 38, 76, 114, 152, 190, 228, 255, 255, 255]),
        ("color", -1, range(0, 200, 20)),  # Grey stays grey.
        ("posterize", 1, [0, 16, 32, 48, 80, 96, 112, 128, 160, 176]),  # Four bits.
        ("solarize", 0.5, [0, 20, 40, 60, 80, 100, 120, 115, 95, 75]),  # From 128 on.
        ("solarize", 1, range(255, 55, -20)),
        ("autocontrast", 0, [0, 28, 56, 85, 113, 141, 170, 198, 226, 255]),
        ("rotate", 0, range(0, 200, 20)),
        ("shear_x", 0, range(0, 200, 20)),
    ],
)
def test_operations(name, share, row):
    assert row_of(name, share) == list(row)


def test_shear_moves_rows_by_their_height():
    """Row y is taken from columns that lie 0.3 * y further to the right."""
    sheared = np.asarray(OPERATIONS["shear_x"](PICTURE, 1))[..., 0]
    for y in range(10):
        places = np.floor(np.arange(10) + 0.5 + 0.3 * (y + 0.5)).astype(int)
        assert sheared[y].tolist() == [20 * x if x < 10 else 0 for x in places]


def test_rand_augment_follows_its_random_numbers():
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    image = Image.fromarray(noise)

    def changed(seed):
        return np.asarray(rand_augment(image, 2, 15, np.random.default_rng(seed)))

    results = [changed(seed) for seed in range(20)]
    assert all(each.shape == noise.shape for each in results)
    np.testing.assert_array_equal(results[7], changed(7))
    assert sum(bool((each != noise).any()) for each in results) > 15


def batch(count=3, side=8):
    values = np.arange(1, count + 1, dtype=np.uint8) * 50
    pixels = np.broadcast_to(values[:, None, None, None], (count, side, side, 3))
    return jnp.asarray(pixels), jnp.eye(count)


def test_nothing_is_mixed_by_default():
    pixels, targets = batch()
    mixed = mix(pixels, targets, KEY)
    assert mixed[0] is pixels and mixed[1] is targets


def test_mixup_adds_each_picture_to_the_one_before_it():
    pixels, targets = batch()
    mixed, shares = map(np.asarray, mix(pixels, targets, KEY, mixup=0.4))
    own = shares[0, 0]
    assert 0 < own < 1
    before = np.array([150, 50, 100])
    expected = own * pixels[:, 0, 0, 0] + (1 - own) * before
    np.testing.assert_allclose(
        mixed, np.broadcast_to(expected[:, None, None, None], mixed.shape), atol=0.51
    )
    np.testing.assert_allclose(shares, own * targets + (1 - own) * np.roll(targets, 1, 0))


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_puts_a_rectangle_of_the_one_before_into_each(seed):
    pixels, targets = batch()
    mixed, shares = map(np.asarray, mix(pixels, targets, jax.random.key(seed), cutmix=1.0))
    foreign = mixed[0, ..., 0] == 150
    assert np.isin(mixed[0], (50, 150)).all() and (foreign == (mixed[1, ..., 0] == 50)).all()
    rows, columns = foreign.any(1), foreign.any(0)
    np.testing.assert_array_equal(foreign, rows[:, None] & columns)
    for line in (rows, columns):  # One piece.
        assert np.abs(np.diff(line.astype(int))).sum() <= 2
    np.testing.assert_allclose(shares[0], [1 - foreign.mean(), 0, foreign.mean()], atol=1e-6)


def test_both_take_turns_by_chance():
    pixels, targets = batch(side=32)
    kinds = []
    for seed in range(40):
        with jax.numpy_rank_promotion("raise"):
            mixed, _ = mix(pixels, targets, jax.random.key(seed), mixup=1.0, cutmix=1.0)
        kinds.append(bool(np.isin(np.asarray(mixed[0]), (50, 150)).all()))
    assert 10 < sum(kinds) < 30
