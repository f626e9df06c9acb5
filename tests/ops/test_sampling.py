import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvit_jax.ops.sampling import (
    cumulative_scores,
    masked_weights,
    nearest_entries,
    new_places,
    pack_distinct,
    sample_tokens,
    significance,
)
from tests.golden import Goldens

CASES = Goldens().cases("ats_")


sample = jax.jit(sample_tokens, static_argnames=("points", "limit"))


def chosen(scores, lengths, has_padding, *, points, limit):
    """Sample a batch; return each image's list and the count of what it sampled."""
    scores = jnp.asarray(scores, jnp.float32)
    valid = jnp.arange(scores.shape[1]) < jnp.asarray(lengths)[:, None]
    kept, count = sample(scores, valid, jnp.asarray(has_padding), points=points, limit=limit)
    counts = np.minimum(count, limit)
    return [list(row[:n]) for row, n in zip(np.asarray(kept), counts, strict=True)], list(count)


class TestHandComputed:
    def test_an_unpadded_image_never_keeps_its_lowest_token(self):
        # Sorted sums 0.1 0.3 0.6 1 become 0 0.22 0.56 1; points at 0.22 0.48 0.74 1.
        kept, count = chosen([[0.1, 0.4, 0.2, 0.3]], [4], [False], points=4, limit=4)
        assert kept == [[2, 3, 1]] and count == [3]

    def test_a_padded_image_may_keep_it(self):
        # The sums stay 0.1 0.3 0.6 1; points at 0.1 0.4 0.7 1.
        kept, count = chosen([[0.1, 0.4, 0.2, 0.3, 9.0]], [4], [True], points=4, limit=4)
        assert kept == [[0, 2, 3, 1]] and count == [4]

    def test_one_token_that_holds_nearly_all_is_kept_alone(self):
        # Sums become 0 0.01 0.02 1; points at 0.01 0.34 0.67 1 are nearest to 0.01, 0.02 or 1.
        kept, _ = chosen([[0.01, 0.01, 0.01, 0.97]], [4], [False], points=2, limit=2)
        assert kept == [[1, 3]]

    def test_over_budget_the_highest_scores_stay(self):
        kept, count = chosen([[0.1, 0.4, 0.2, 0.3]], [4], [False], points=4, limit=2)
        assert kept == [[3, 1]] and count == [3]

    def test_a_single_token_stays(self):
        kept, _ = chosen([[0.3, 0.0], [1.0, 0.0]], [1, 1], [False, True], points=4, limit=2)
        assert kept == [[0], [0]]

    def test_tokens_without_any_score_leave_one(self):
        kept, _ = chosen([[0.0, 0.0, 0.0]], [3], [False], points=5, limit=3)
        assert kept == [[0]]

    def test_padding_is_never_kept_beside_a_tiny_score(self):
        # In float32 the point 0.5 is as far from the padding's 0 as from 1e-12.
        kept, count = chosen([[1e-12, 1.0, 0.0]], [2], [True], points=3, limit=3)
        assert kept == [[0, 1]] and count == [2]

    def test_padding_changes_nothing(self):
        alone, _ = chosen([[0.1, 0.4, 0.2, 0.3]], [4], [False], points=4, limit=4)
        beside, _ = chosen([[0.1, 0.4, 0.2, 0.3, 7, 7]], [4], [False], points=4, limit=4)
        assert alone == beside

    def test_of_equally_near_entries_the_first_is_taken(self):
        # Points at 0.25 0.5 0.75 1: 0.5 lies midway between 0.25 and 0.75, and 1 stands twice.
        cdf = jnp.array([[0.0, 0.25, 0.75, 1.0, 1.0]])
        assert nearest_entries(cdf, points=4).tolist() == [[1, 1, 2, 3]]

    def test_cumulative_scores(self):
        ascending = jnp.array([[0.0, 1.0, 2.0, 5.0]] * 2)
        valid = jnp.array([[False, True, True, True]] * 2)
        sums = cumulative_scores(ascending, valid, jnp.array([False, True]))
        expected = [[0, 0, 2 / 7, 1], [0, 1 / 8, 3 / 8, 1]]
        np.testing.assert_allclose(sums, expected, rtol=1e-6)

    def test_significance(self):
        weights = jnp.array([[[0.5, 0.3, 0.2], [0.8, 0.1, 0.1]]])
        v = jnp.array([[[[9.0], [9.0]], [[3.0], [4.0]], [[0.0], [2.0]]]])
        # (0.4 * 5, 0.3 * 2), scaled to sum 1.
        np.testing.assert_allclose(
            significance(weights, v, prefix=1), [[2 / 2.6, 0.6 / 2.6]], rtol=1e-6
        )

    def test_weights_count_the_padding_of_a_padded_image_only(self):
        # Products -12 and -13 over sqrt(1); e^-12 = 6.14e-6 is near the 1e-6 that is added.
        q, k = jnp.ones((2, 1, 1, 1)), jnp.array([-12.0, -13.0, 50.0]).reshape(1, 3, 1, 1)
        valid = jnp.array([[True, True, False]] * 2)
        weights = masked_weights(q, jnp.tile(k, (2, 1, 1, 1)), valid, jnp.array([2, 3]))
        low, high, e = np.exp(-13.0), np.exp(-12.0), np.exp(-1.0)
        alone = [(1 + 5e-7) / (1 + e + 1e-6), (e + 5e-7) / (1 + e + 1e-6), 0]
        padded = [
            (high + 1e-6 / 3) / (high + low + 1e-6),
            (low + 1e-6 / 3) / (high + low + 1e-6),
            0,
        ]
        np.testing.assert_allclose(weights[:, 0, 0], [alone, padded], rtol=2e-5)

    def test_pack_distinct_keeps_the_largest(self):
        indices = jnp.array([[3, 1, 3, 0, 1, 7], [2, 2, 2, 2, 2, 2]])
        packed, count = pack_distinct(indices, limit=3)
        assert packed[0].tolist() == [1, 3, 7] and packed[1, 0] == 2
        assert count.tolist() == [4, 1]

    def test_new_places(self):
        kept = jnp.array([[0, 3, 1], [0, 2, 2]])
        exists = jnp.array([[True, True, True], [True, True, False]])
        places = new_places(kept, exists, tokens=4)
        assert places.tolist() == [[0, 2, -1, 1], [0, -1, 1, -1]]


def reference(scores, has_padding, points):
    """Sample one image's patches, literally as DESIGN.md says; returns indices into `scores`."""
    order = np.argsort(scores, kind="stable")
    sums = np.cumsum(scores[order], dtype=np.float64)
    least = 0 if has_padding else sums.min()
    cdf = (sums - least) / (sums.max() - least)
    start = cdf[cdf > 0].min()
    j = np.arange(points)
    values = start + (j - start * j) / (points - 1)
    padded = np.concatenate([np.zeros(points - len(cdf)), cdf])
    nearest = np.abs(values[:, None] - padded).argmin(1) - (points - len(cdf))
    return order[np.unique(nearest)].tolist()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.tuples(*[st.integers(2, 11)] * 4),
    has_padding=st.tuples(*[st.booleans()] * 4),
    points=st.sampled_from([11, 23]),
    limit=st.sampled_from([4, 11]),
    sharpness=st.floats(0.1, 6),
)
def test_sampling_matches_numpy(seed, lengths, has_padding, points, limit, sharpness):
    scores = 0.02 + np.random.default_rng(seed).random((4, 11), np.float32) ** np.float32(sharpness)
    kept, counts = chosen(scores, lengths, has_padding, points=points, limit=limit)
    for row, length, padded, mine, count in zip(
        scores, lengths, has_padding, kept, counts, strict=True
    ):
        expected = reference(row[:length], padded, points)
        assert count == len(expected)
        assert mine == expected[-limit:]
        lowest = int(np.argmin(row[:length]))
        assert padded or lowest not in mine


@settings(max_examples=30, deadline=None)
@given(indices=st.lists(st.integers(0, 8), min_size=8, max_size=8), limit=st.sampled_from([3, 8]))
def test_pack_distinct_matches_numpy(indices, limit):
    pack = jax.jit(pack_distinct, static_argnames="limit")
    packed, count = pack(jnp.array([indices]), limit=limit)
    expected = np.unique(indices)
    assert int(count[0]) == len(expected)
    assert packed[0, : min(limit, len(expected))].tolist() == expected[-limit:].tolist()


def test_distances_are_never_stored():
    """Points x tokens would be 32 * 1369 * 1369 * 4 bytes = 240 MB."""
    cdf = jax.ShapeDtypeStruct((32, 1369), jnp.float32)
    search = jax.jit(lambda cdf: nearest_entries(cdf, points=1369))
    assert search.lower(cdf).compile().memory_analysis().temp_size_in_bytes < 10e6


@pytest.mark.parametrize("name", CASES)
def test_parity_sampling(goldens, name):
    case = goldens.case(name)
    points = int(case["n_ref"]) - 1
    q, k, v = (jnp.asarray(case[field]).swapaxes(1, 2) for field in "qkv")
    kept, count, out = sampled_attention(q, k, v, jnp.asarray(case["policy"]), points=points)
    exists = case["policy_out"][..., 0] > 0
    np.testing.assert_array_equal(count, exists.sum(-1))
    kept, out = kept[:, : exists.shape[1]], out[:, :, : exists.shape[1]]
    selected = np.take_along_axis(case["raw_x"], np.asarray(kept)[..., None], axis=1)
    np.testing.assert_array_equal(selected[exists], case["selected_x"][exists])
    expected = np.moveaxis(case["out"], 1, 2)
    np.testing.assert_allclose(np.moveaxis(out, 1, 2)[exists], expected[exists], atol=2e-5)
    assert not expected[~exists].any()


@functools.partial(jax.jit, static_argnames="points")
def sampled_attention(q, k, v, policy, *, points):
    valid = policy[..., 0] > 0
    rows = jnp.full(len(valid), valid.shape[1])
    weights = masked_weights(q[:, :1], k, valid, rows)[:, :, 0]
    scores, padded = significance(weights, v, prefix=1), valid.sum(-1) < rows
    limit = valid.shape[1] - 1
    patches, count = sample_tokens(scores, valid[:, 1:], padded, points=points, limit=limit)
    kept = jnp.pad(patches + 1, ((0, 0), (1, 0)))
    queries = jnp.take_along_axis(q, kept[..., None, None], axis=1)
    out = jnp.einsum("bhnm,bmhd->bhnd", masked_weights(queries, k, valid, rows), v)
    return kept, count + 1, out
