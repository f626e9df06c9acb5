"""Groups of equal hashes, their means, and the golden attention to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvit_jax.ops import grouping
from hvit_jax.ops.attention import attend
from hvit_jax.ops.grouping import copy_to_members
from hvit_jax.ops.hashing import HashDraws, draw_hashes, hash_bins
from hvit_jax.ops.platform import compiled_for
from tests.golden import Goldens
from tests.ops.test_hashing import identity_hash, packed_numbers

group_tokens = jax.jit(grouping.group_tokens, static_argnames="max_groups")
group_means = jax.jit(grouping.group_means)
member_codes = jax.jit(grouping.member_codes, static_argnames=("size", "dtype"))


def heads(x):
    """Lay a golden (rows, N, ...) out as one image whose rows are its heads."""
    return jnp.asarray(x[None].swapaxes(1, 2))


def vectors(*bins):
    """One image with one head, whose bins are given."""
    return jnp.asarray(bins, jnp.float32)[None, :, None, :]


def groups_in_numpy(packed, budget):
    """Group ids of one list of hashes, and how many differ."""
    values, ranks = np.unique(packed, return_inverse=True)
    if len(values) > budget:
        ranks = ranks * budget // len(values)
    return ranks.reshape(packed.shape), len(values)


class TestGroups:
    def test_hand_computed(self):
        """Hashes 3, 0, 3, 2, 0: three groups, numbered in the order of their hashes."""
        groups = group_tokens(vectors([3], [0], [3], [2], [0]), identity_hash(1), max_groups=4)
        np.testing.assert_array_equal(groups.members[0, 0], [2, 0, 2, 1, 0])
        np.testing.assert_array_equal(groups.counts[0, 0], [2, 1, 2, 0])
        np.testing.assert_array_equal(groups.order[0, 0], [1, 4, 3, 0, 2])
        np.testing.assert_array_equal(groups.slots[0, 0], [0, 0, 1, 2, 2])
        np.testing.assert_array_equal(groups.starts[0, 0], [0, 2, 3, 5])
        assert int(groups.distinct[0, 0]) == 3

    def test_the_highest_hash_may_be_the_first_group(self):
        """Bin 2 of hash 31 packs to a negative number, which sorts before all others."""
        x = np.zeros((1, 3, 1, 32), np.float32)
        x[0, 1, 0, 31], x[0, 2, 0, 30] = 2, 1
        groups = group_tokens(jnp.asarray(x), identity_hash(32), max_groups=3)
        np.testing.assert_array_equal(groups.members[0, 0], [1, 0, 2])

    def test_over_budget_neighbours_merge_evenly(self):
        """Seven hashes in three slots: floor(g * 3 / 7) is 0, 0, 0, 1, 1, 2, 2."""
        x = vectors([6], [0], [5], [1], [4], [2], [3])
        groups = group_tokens(x, identity_hash(1), max_groups=3)
        np.testing.assert_array_equal(groups.members[0, 0], [2, 0, 2, 0, 1, 0, 1])
        np.testing.assert_array_equal(groups.counts[0, 0], [3, 2, 2])
        assert int(groups.distinct[0, 0]) == 7
        np.testing.assert_allclose(group_means(x, groups)[0, :, 0, 0], [1, 3.5, 5.5], rtol=1e-6)

    def test_onnx_files_group_alike(self):
        """There hashes come in other words, and runs are found otherwise."""
        x = 9 * jax.random.normal(jax.random.key(0), (2, 40, 3, 8))
        draws = draw_hashes(jax.random.key(1), 8, 5)
        for budget in (40, 6):
            expected = group_tokens(x, draws, max_groups=budget)
            with compiled_for("onnx"):
                found = grouping.group_tokens(x, draws, max_groups=budget)
            for each in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(*each)

    @settings(max_examples=50, deadline=None)
    @given(st.data(), st.sampled_from([(1, 1, 2), (7, 2, 3), (12, 3, 15)]))
    def test_equals_numpy(self, data, sizes):
        size, hashes, budget = sizes
        bins = data.draw(hnp.arrays(np.int64, (2, size, 2, hashes), elements=st.integers(0, 3)))
        groups = group_tokens(
            jnp.asarray(bins, jnp.float32), identity_hash(hashes), max_groups=budget
        )
        shifted = bins - bins.min(1, keepdims=True)
        packed = (shifted << (2 * np.arange(hashes))).sum(-1).swapaxes(1, 2)
        for image, head in np.ndindex(2, 2):
            members, distinct = groups_in_numpy(packed[image, head], budget)
            np.testing.assert_array_equal(groups.members[image, head], members)
            counts = np.bincount(members, minlength=budget)
            np.testing.assert_array_equal(groups.counts[image, head], counts)
            assert int(groups.distinct[image, head]) == distinct

    @pytest.mark.parametrize("spread", [0.002, 0.02, 1.0, 100.0])
    def test_means_of_a_long_sequence(self, spread):
        """Runs shorter and longer than a chunk of sorted tokens; large values, sorted like them."""
        size = 1370
        x = 20 + np.sort(3 * np.random.default_rng(0).normal(size=(1, size, 2, 4)), axis=1)
        x = x.astype(np.float32)
        groups = group_tokens(jnp.asarray(spread * x), identity_hash(4), max_groups=size)
        means = np.asarray(group_means(jnp.asarray(x), groups), np.float64)
        for head in range(2):
            members = np.asarray(groups.members[0, head])
            same = members[:, None] == members
            exact = (same @ x[0, :, head].astype(np.float64)) / same.sum(1, keepdims=True)
            np.testing.assert_allclose(means[0, members, head], exact, rtol=5e-7)

    @settings(max_examples=30, deadline=None)
    @given(st.sampled_from([(1, 3), (150, 7), (300, 300)]), st.integers(1, 400), st.integers(0, 99))
    def test_means_equal_numpy(self, sizes, kinds, seed):
        size, budget = sizes
        bins = np.random.default_rng(seed).integers(kinds, size=size)
        groups = group_tokens(vectors(*bins[:, None]), identity_hash(1), max_groups=budget)
        means = np.asarray(group_means(vectors(*bins[:, None]), groups))[0, :, 0, 0]
        members = np.asarray(groups.members)[0, 0]
        for group in range(budget):
            expected = bins[members == group].mean() if group in members else 0
            np.testing.assert_allclose(means[group], expected, rtol=1e-6)

    def test_unused_groups_hold_zeros(self):
        x = vectors([1], [1], [4])
        groups = group_tokens(x, identity_hash(1), max_groups=5)
        np.testing.assert_array_equal(group_means(x, groups)[0, :, 0, 0], [1, 4, 0, 0, 0])

    def test_vectors_that_stand_there_several_times_are_their_own_means(self):
        """With a slot a token and hashes that tell different vectors apart."""
        x = 200 * jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
        x = x[:, jnp.array([0, 1, 1, 2, 4, 3, 3, 3, 4, 0, 3])]
        groups = group_tokens(x, draw_hashes(jax.random.key(1), 8, 16), max_groups=11)
        np.testing.assert_array_equal(groups.distinct, 5)
        np.testing.assert_allclose(copy_to_members(group_means(x, groups), groups), x, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    @pytest.mark.parametrize(("size", "width", "budget"), [(300, 64, 290), (40, 80, 32), (9, 8, 1)])
    def test_attention_between_codes_averages_members(self, dtype, size, width, budget):
        x = 3 * jax.random.normal(jax.random.key(0), (2, size, 3, width))
        groups = group_tokens(x, draw_hashes(jax.random.key(1), width, 4), max_groups=budget)
        queries, keys = member_codes(groups, size=width, dtype=dtype)
        assert queries.dtype == keys.dtype == dtype
        values = x.astype(dtype)
        means = np.asarray(jax.jit(attend)(queries, keys, values), np.float64)
        used = np.asarray(groups.counts > 0).swapaxes(1, 2)
        assert budget < 200 or not used.all()
        expected = np.asarray(group_means(values, groups), np.float64)
        np.testing.assert_allclose(means[used], expected[used], rtol=2**-7, atol=1e-6)
        assert np.isfinite(means).all()

    def test_every_member_gets_its_groups_vector(self):
        groups = group_tokens(vectors([3], [0], [3], [2]), identity_hash(1), max_groups=3)
        values = jnp.array([10.0, 20.0, 30.0])[None, :, None, None]
        np.testing.assert_array_equal(copy_to_members(values, groups)[0, :, 0, 0], [30, 10, 30, 20])


def golden_hash(fields, prefix=""):
    return HashDraws(*(jnp.asarray(fields[prefix + name]) for name in ("projection", "offset")))


@pytest.mark.parametrize("case", Goldens().cases("act_"))
def test_parity_act(case, goldens):
    fields = goldens.case(case)
    q, k, v = (heads(fields[name]) for name in "qkv")
    size, scale = q.shape[1], q.shape[-1] ** 0.5
    groups = group_tokens(q, golden_hash(fields), max_groups=size)
    if "bins" in fields:
        bins = hash_bins(q, golden_hash(fields))
        np.testing.assert_array_equal(bins[0], fields["bins"].swapaxes(1, 2))
        np.testing.assert_array_equal(packed_numbers(bins)[0], fields["packed"])
        np.testing.assert_array_equal(groups.members[0], fields["groups"])
        counts = np.pad(fields["counts"], ((0, 0), (0, size - fields["counts"].shape[1])))
        np.testing.assert_array_equal(groups.counts[0], counts)
    means, bias = scale * group_means(q, groups), None
    if "k_projection" in fields:
        keys = group_tokens(k, golden_hash(fields, "k_"), max_groups=size)
        k, v, bias = group_means(k, keys), group_means(v, keys), jnp.log(keys.counts)
    out = attend(means, k, v, key_bias=bias)
    out = copy_to_members(out, groups)[0].swapaxes(0, 1)
    np.testing.assert_allclose(out, fields["out"], atol=1e-5)
