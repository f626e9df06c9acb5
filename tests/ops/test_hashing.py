"""Hashes: E2LSH and its packing, XBOX+."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvit_jax.ops.hashing import (
    HashDraws,
    ProjectionDraws,
    draw_hashes,
    draw_projections,
    hash_bins,
    hash_words,
    pack_bins,
    project_asymmetric,
)
from hvit_jax.ops.platform import compiled_for
from tests.golden import Goldens


def identity_hash(hashes):
    """Draws under which bin `i` of a vector is the floor of its channel `i`."""
    return HashDraws(8 * jnp.eye(hashes), jnp.zeros(hashes))


def packed_numbers(bins):
    bins = jnp.asarray(bins, jnp.int32)
    high, low = jax.jit(pack_bins)(bins)
    packed = (np.asarray(high, np.int64) << 32) | np.asarray(low, np.int64)
    with compiled_for("onnx"):  # In numbers of 16 bits.
        high, *low = (
            np.asarray(digits, np.int64) for digits in jax.jit(lambda x: pack_bins(x))(bins)
        )
    for digits in low:
        high = (high << 16) | digits
    np.testing.assert_array_equal(high, packed)
    return packed


class TestBins:
    def test_hand_computed(self):
        """Two channels, two hashes: 2a + b + 0.5 and -4b, each divided by 8."""
        draws = HashDraws(jnp.array([[2.0, 0.0], [1.0, -4.0]]), jnp.array([0.5, 0.0]))
        x = jnp.array([[0.0, 0.0], [3.0, 1.5], [4.0, -1.0], [-0.25, -0.5]])[None, :, None, :]
        # floor of 0.0625, 1.0, 0.9375, -0.0625 and of 0, -0.75, 0.5, 0.25
        expected = [[1, 1], [2, 0], [1, 1], [0, 1]]
        np.testing.assert_array_equal(hash_bins(x, draws)[0, 0], expected)

    def test_every_image_and_head_has_its_own_minimum(self):
        x = jnp.array([[[5.0], [2.0]], [[7.0], [2.0]]])[None]
        bins = hash_bins(x, identity_hash(1))
        np.testing.assert_array_equal(bins[0, :, :, 0], [[0, 2], [0, 0]])

    @pytest.mark.parametrize("scale", [1.0, 0.3])
    def test_bfloat16_meets_directions_rounded_alike(self, scale):
        x = (7 * jax.random.normal(jax.random.key(0), (2, 40, 3, 16))).astype(jnp.bfloat16)
        draws = draw_hashes(jax.random.key(1), 16, 12)
        rounded = draws._replace(
            projection=(scale * draws.projection).astype(jnp.bfloat16).astype(jnp.float32)
        )
        exact = hash_bins(x.astype(jnp.float32), rounded)
        bins = hash_bins(x, draws, scale=scale)
        np.testing.assert_array_equal(bins, exact)
        unrounded = hash_bins(x.astype(jnp.float32), draws, scale=scale)
        assert 0.9 < np.mean(np.equal(bins, unrounded)) < 1

    def test_draws_have_the_stated_distributions(self):
        draws = draw_hashes(jax.random.key(0), 64, 512)
        assert draws.projection.shape == (64, 512) and draws.offset.shape == (512,)
        assert abs(float(draws.projection.std()) - 1) < 0.02
        assert abs(float(draws.projection.mean())) < 0.02
        assert 0 <= float(draws.offset.min()) < 0.02 and 0.98 < float(draws.offset.max()) < 1

    @pytest.mark.parametrize("hashes", [3, 16, 17, 32])
    @pytest.mark.parametrize("most", [5, 100_000])
    def test_a_gpus_words_are_those_of_packed_bins_or_ordered_alike(self, hashes, most):
        x = jax.random.randint(jax.random.key(0), (2, 60, 3, hashes), -most, most + 1)
        x = x.at[:, 1::2].set(x[:, ::2]).astype(jnp.float32)
        expected = packed_numbers(jax.jit(hash_bins)(x, identity_hash(hashes)))
        with compiled_for("gpu"):
            high, low = jax.jit(hash_words)(x, identity_hash(hashes))
        words = (np.asarray(high, np.int64) << 32) | np.asarray(low, np.int64)
        # What words of up to 16 hashes are larger by is the same for all vectors of a head.
        larger = (words - expected)[..., :1] * (hashes <= 16)
        np.testing.assert_array_equal(words - larger, expected)


class TestPacking:
    def test_hand_computed(self):
        """1 + 2 * 4 + 3 * 16, and a bin above 3 that reaches into its neighbour's bits."""
        np.testing.assert_array_equal(packed_numbers([[[[1, 2, 3], [9, 0, 0]]]]), [[[57, 9]]])

    def test_the_last_hashes_wrap(self):
        """Bin 2 at hash 31 is 2^63, the lowest signed number; bin 4 there leaves 64 bits."""
        bins = np.zeros((1, 1, 3, 32), int)
        bins[0, 0, :, 31] = 1, 2, 4
        bins[0, 0, 2, 0] = 5
        np.testing.assert_array_equal(packed_numbers(bins), [[[2**62, -(2**63), 5]]])

    @settings(max_examples=60, deadline=None)
    @given(
        hnp.arrays(
            np.int64,
            st.sampled_from([(1, 1, 1, 3), (1, 1, 4, 17), (1, 1, 5, 32)]),
            elements=st.one_of(st.integers(0, 9), st.integers(0, 2**31 - 1)),
        )
    )
    def test_equals_64_bit_arithmetic(self, bins):
        exact = [sum(int(b) << (2 * i) for i, b in enumerate(row)) for row in bins[0, 0]]
        wrapped = [(value + 2**63) % 2**64 - 2**63 for value in exact]
        np.testing.assert_array_equal(packed_numbers(bins)[0, 0], wrapped)


class TestProjections:
    def test_equals_the_definition(self):
        q, k = jax.random.normal(jax.random.key(0), (2, 2, 3, 7, 5)) * 3
        draws = draw_projections(jax.random.key(1), 5, 4)
        ours = project_asymmetric(q, k, draws)
        q, k, alpha = (np.asarray(x, np.float64) for x in (q, k, draws.alpha))
        squares = [np.square(x).sum(-1, keepdims=True) for x in (q, k)]
        radius = squares[0].max(2, keepdims=True) + squares[1].max(2, keepdims=True)
        extra = [np.sqrt(radius - square) for square in squares]
        none = np.zeros_like(extra[0])
        mapped = [
            np.concatenate([q, none, extra[0]], -1),
            np.concatenate([k, extra[1], none], -1),
        ]
        for x, projected in zip(mapped, ours, strict=True):
            np.testing.assert_allclose(np.square(x).sum(-1), radius[..., 0].repeat(7, 2))
            expected = np.moveaxis(x @ alpha + np.asarray(draws.beta), -1, 0)
            np.testing.assert_allclose(projected, expected, atol=2e-5)

    def test_draws_have_the_stated_distributions(self):
        draws = draw_projections(jax.random.key(0), 62, 512)
        assert draws.alpha.shape == (64, 512) and draws.beta.shape == (512,)
        assert abs(float(draws.alpha.std()) - 1) < 0.02
        assert 0 <= float(draws.beta.min()) < 0.02 and 0.98 < float(draws.beta.max()) < 1

    @pytest.mark.parametrize("case", Goldens().cases("smyrf_"))
    def test_parity_positions(self, case, goldens):
        fields = goldens.case(case)
        draws = ProjectionDraws(jnp.asarray(fields["alpha"]), jnp.asarray(fields["beta"][0]))
        q, k = (jnp.asarray(fields[name][None]) for name in "qk")
        projected = project_asymmetric(q, k, draws)
        for name, projections in zip("qk", projected, strict=True):
            positions = jnp.argsort(projections[:, 0])
            np.testing.assert_array_equal(positions, fields[f"{name}_positions"])
