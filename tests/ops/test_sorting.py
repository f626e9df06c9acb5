"""Sorts, as either device runs them, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.ops.platform import compiled_for
from hvit_jax.ops.sorting import (
    argsort,
    inverse,
    numbers_of_parts,
    put_back,
    ranks,
    sort,
    sort_words,
)

SHAPES = [(3, 2, 17), (4, 130), (1, 1)]


@pytest.fixture(params=["cpu", "gpu", "onnx"], autouse=True)
def program(request):
    """Count, or sort as on a GPU, or without the order of equal values."""
    with compiled_for(request.param):
        yield request.param


def values(shape, dtype):
    """Numbers of which many are equal, with zeros of both signs, tiny and infinite ones."""
    numbers = np.round(3 * np.random.default_rng(0).normal(size=shape)) / 4
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(4 * numbers + 20, dtype)
    if shape[-1] > 9:
        numbers[..., 1:9] = [-0.0, np.inf, -np.inf, 1e-7, 0, -1e-7, np.inf, -np.inf]
    return jnp.asarray(numbers, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32])
def test_equal_values_keep_their_order(shape, dtype):
    x = values(shape, dtype)
    wide = np.asarray(x, np.float64)
    order = np.argsort(wide, kind="stable")
    found = jax.jit(lambda x: (argsort(x), ranks(x), sort(x)))(x)
    for ours, expected in zip(found, (order, np.argsort(order), np.sort(wide)), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, jnp.int32), (12, jnp.uint32), (5, jnp.bfloat16), (17, jnp.float32)]
)
def test_parts_of_the_order(size, dtype):
    """Equal values come into different parts by their places; of 5 or 17, one is not sorted."""
    x = jnp.stack([values((size + 20,), dtype)[start : start + size] for start in range(20)])
    order = np.argsort(np.asarray(x, np.float64), kind="stable")
    lengths = (1, 4, size)
    found = jax.jit(lambda x: [numbers_of_parts(x, length) for length in lengths])(x)
    for length, numbers in zip(lengths, found, strict=True):
        np.testing.assert_array_equal(numbers, np.argsort(order) // length)


@pytest.mark.parametrize("size", [5, 16, 1025])
@pytest.mark.parametrize(("dtype", "scale"), [(jnp.float32, 1e-3), (jnp.bfloat16, 1)])
def test_parts_of_the_order_of_rounded_values(size, dtype, scale):
    """Equal values, of which there are many, keep their order; rounding leaves others apart."""
    x = (scale * jax.random.normal(jax.random.key(0), (20, size)) + 7).astype(dtype)
    x = x.at[3].set(2.5)
    order = np.argsort(np.asarray(x, np.float64), kind="stable")
    numbers = jax.jit(lambda x: numbers_of_parts(x, 4, rounded=True))(x)
    np.testing.assert_array_equal(numbers, np.argsort(order) // 4)


def test_values_are_rounded_to_a_part_of_their_range(program):
    """Of six, three bits hold the place, and 24 the value."""
    x = jnp.float32([[2**24, 1.5, 0.4, 2.7, 2.3, 0]])
    numbers = numbers_of_parts(x, 1, rounded=True)[0]
    rounded, exact = [5, 2, 0, 3, 4, 1], [5, 2, 1, 4, 3, 0]
    np.testing.assert_array_equal(numbers, rounded if program == "gpu" else exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_second_word_decides_where_the_first_is_equal(shape):
    first, second = values(shape, jnp.int32), values(shape, jnp.uint32)[..., ::-1]
    joined = np.asarray(first, np.float64) * 1e6 + np.asarray(second, np.float64)
    expected = np.argsort(np.argsort(joined, kind="stable"))

    @jax.jit
    def run(first, second):
        words, order = sort_words(first, second)
        return ranks(first, second), order, words, [put_back(word, order) for word in words]

    places, order, *sorted_and_back = run(first, second)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(order, np.argsort(expected))
    for word, back, given in zip(*sorted_and_back, (first, second), strict=True):
        np.testing.assert_array_equal(back, given)
        np.testing.assert_array_equal(word, np.take_along_axis(np.asarray(given), order, -1))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint32])
def test_the_largest_integer_as_second_word(dtype):
    """One more than it is the next first word and the least second one."""
    most, least = np.iinfo(dtype).max, np.iinfo(dtype).min
    first = jnp.asarray([[5] * 40 + [6, 5, 6]])
    second = jnp.asarray([[most, 3] * 20 + [least, most, most]], dtype)
    np.testing.assert_array_equal(
        inverse(ranks(first, second)), [[*range(1, 40, 2), *range(0, 40, 2), 41, 40, 42]]
    )


def test_denormal_numbers_are_not_zero():
    """A processor that takes them for zero would find them equal."""
    x = np.float32([[4e-45, 0, 1e-45, -1e-45, -0.0]])
    np.testing.assert_array_equal(jax.jit(argsort)(x), [[3, 1, 4, 2, 0]])


def test_a_number_that_is_none_leaves_other_rows_alone(program):
    x = values((3, 40), jnp.float32)
    # That of x86, one of NVIDIA's, and those that Python makes.
    strange = np.array([0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32)
    odd = x.at[1, 5:9].set(strange.view(np.float32))
    np.testing.assert_array_equal(argsort(odd)[::2], argsort(x)[::2])
    last = argsort(odd)[1, -4:]  # No two of them are equal.
    np.testing.assert_array_equal(np.sort(last) if program == "onnx" else last, [5, 6, 7, 8])
    np.testing.assert_array_equal(np.sort(argsort(odd)[1]), np.arange(40))


def test_inverse_and_no_gradient():
    x = values((2, 3, 20), jnp.float32)
    order = argsort(x)
    np.testing.assert_array_equal(inverse(order), np.argsort(order))
    np.testing.assert_array_equal(inverse(inverse(order)), order)
    assert not jax.grad(lambda x: ranks(x).astype(jnp.float32).sum())(x).any()
