"""Bipartite soft matching, merging, unmerging and schedules, without a model."""

import ast
import functools
import json
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from hvit_jax.errors import InputError
from hvit_jax.ops import matching as matchings
from hvit_jax.ops import merging
from hvit_jax.ops.arrays import layer_norm
from hvit_jax.ops.matching import most_merges
from hvit_jax.ops.merging import merge_counts
from hvit_jax.ops.platform import compiled_for

# A function traced for one device is not traced again for the other.
MATCH = {
    target: jax.jit(functools.partial(matchings.match_tokens), static_argnames=("r", "prefix"))
    for target in ("cpu", "gpu")
}
match_tokens = MATCH["cpu"]
merge_tokens = jax.jit(merging.merge_tokens)
unmerge_tokens = jax.jit(merging.unmerge_tokens)

# Directions on the unit circle, in degrees: A is 0, 40, 90, 135; B is 10, 42, 100.
ANGLES = np.deg2rad([0, 10, 40, 42, 90, 100, 135])
METRIC = jnp.asarray(np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)[None], jnp.float32)
TOKENS = jnp.asarray([[[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0]]])
SIZES = jnp.asarray([[1.0, 1.0, 3.0, 1.0, 1.0, 4.0, 1.0]])


def test_matching_by_hand():
    matching = match_tokens(METRIC, r=2)
    # 40 and 42 degrees are nearest, then 90 and 100; the class token's 10 degrees do not count.
    assert matching.sources.tolist() == [[0, 6, 1, 3, 5]]
    assert matching.leaving.tolist() == [[2, 4]]
    assert matching.targets.tolist() == [[1, 2]]
    assert matching.places.tolist() == [[0, 2, 3, 3, 4, 4, 1]]


def test_matching_without_class_token_by_hand():
    matching = match_tokens(METRIC, r=1, prefix=0)
    # What stays comes in descending similarity: 10 degrees (twice, first one first), 35 degrees.
    assert matching.leaving.tolist() == [[2]] and matching.sources[0, 2] == 6
    assert sorted(matching.sources[0, :2].tolist()) == [0, 4]
    assert matching.targets.tolist() == [[1]]


def test_merging_by_hand():
    merged, sizes = merge_tokens(TOKENS, SIZES, match_tokens(METRIC, r=2))
    # (3*3 + 1*4) / 4 and (1*5 + 4*6) / 5.
    np.testing.assert_allclose(merged[0, :, 0], [1, 7, 2, 3.25, 5.8], rtol=1e-6)
    assert sizes.tolist() == [[1, 1, 1, 4, 5]]


def test_several_tokens_join_one():
    metric = jnp.asarray([[[1.0, 0], [-1, 0.1], [1, 0.1], [1, 0], [1, -0.1], [-1, 0], [-1, 0.9]]])
    matching = match_tokens(metric, r=2)
    merged, sizes = merge_tokens(TOKENS, SIZES, matching)
    np.testing.assert_allclose(merged[0, :, 0], [1, 7, 2, (9 + 4 + 5) / 5, 6], rtol=1e-6)
    assert sizes.tolist() == [[1, 1, 1, 5, 4]]
    unmerged = unmerge_tokens(merged, matching)[0, :, 0]
    np.testing.assert_allclose(unmerged, [1, 2, 3.6, 3.6, 3.6, 6, 7], rtol=1e-6)


def test_equal_similarities_go_to_the_lower_position():
    matching = match_tokens(jnp.ones((1, 9, 4)), r=2)
    assert matching.sources.tolist() == [[0, 6, 8, 1, 3, 5, 7]]
    assert matching.leaving.tolist() == [[2, 4]]
    assert matching.targets.tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("tokens", "class_token", "expected"),
    [(41, True, 20), (40, True, 19), (41, False, 20), (40, False, 20), (2, True, 0), (3, True, 1)],
)
def test_most_merges(tokens, class_token, expected):
    assert most_merges(tokens, prefix=int(class_token)) == expected
    metric = jnp.asarray(np.random.default_rng(0).normal(size=(1, tokens, 3)), jnp.float32)
    matching = match_tokens(metric, r=1000, prefix=int(class_token))
    assert matching.targets.shape == (1, expected)
    if class_token:
        assert matching.sources[0, 0] == 0


@pytest.mark.parametrize("tokens", [200, 207])
def test_in_16_bits_a_gpu_compares_finer_than_they_are(tokens):
    """Tokens that are alike: unit vectors rounded to bfloat16 would match others."""
    metric = np.random.default_rng(0).normal(2, 1, (1, tokens, 64)).astype(np.float32)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    matched = []
    for x in (metric, np.asarray(unit.astype(jnp.bfloat16), np.float32)):
        with compiled_for("gpu"):
            matching = jax.jit(functools.partial(matchings.match_tokens, r=60, dtype=jnp.bfloat16))(
                x
            )
        matched.append(matching.places[0].tolist())
    expected, _ = reference_matching(metric[0].astype(np.float64), 60, 1)
    assert matched[0] == expected.tolist() != matched[1]


def test_a_gpu_compares_similarities_of_64_bits():
    metric = np.random.default_rng(0).normal(size=(1, 33, 16))
    with jax.enable_x64(True), compiled_for("gpu"):
        matching = jax.jit(functools.partial(matchings.match_tokens, r=8))(metric)
    expected, _ = reference_matching(metric[0], 8, 1)
    np.testing.assert_array_equal(matching.places[0], expected)


@pytest.mark.parametrize(("tokens", "packed"), [(2**17, True), (2**17 + 1, False)])
def test_places_of_more_than_16_bits_are_not_packed(tokens, packed):
    metric = jax.ShapeDtypeStruct((1, tokens, 1), jnp.float32)
    with compiled_for("gpu"):
        program = jax.make_jaxpr(functools.partial(matchings.match_tokens, r=1))(metric)
    assert ("argmax" in str(program)) != packed


def test_tokens_of_zero_length_stay_finite():
    x = jnp.zeros((1, 7, 2))
    merged, sizes = merge_tokens(x, SIZES, match_tokens(x, r=2))
    assert np.isfinite(merged).all() and sizes.sum() == SIZES.sum()


def reference_matching(metric, r, prefix):
    """Where every token goes, in plain loops: `places` of one image."""
    class_token, apart = prefix % 2, prefix // 2 * 2
    metric = metric[apart:] / np.linalg.norm(metric[apart:], axis=-1, keepdims=True)
    tokens = len(metric)
    a, b = range(0, tokens, 2), range(1, tokens, 2)
    proposals = []
    for i in a:
        similarities = [metric[i] @ metric[j] for j in b]
        target = int(np.argmax(similarities))
        proposals.append((np.inf if class_token and i == 0 else -similarities[target], i, target))
    proposals.sort()
    r = min(r, (tokens - class_token) // 2)
    stay = [i for _, i, _ in proposals[r:]]
    stay = sorted(stay) if class_token else stay
    places = {i: place for place, i in enumerate(stay)}
    places |= {j: len(stay) + place for place, j in enumerate(b)}
    places |= {i: len(stay) + target for _, i, target in proposals[:r]}
    places = [*range(apart), *(apart + places[i] for i in range(tokens))]
    return np.array(places), apart + len(stay) + len(b)


@st.composite
def merges(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    r, prefix = draw(st.sampled_from([0, 3, 30])), draw(st.sampled_from([0, 1, 2, 5]))
    tokens = draw(st.sampled_from([3, 8, 17])) + prefix // 2 * 2
    metric = rng.normal(size=(2, tokens, 5)).astype(np.float32)
    x = rng.normal(size=(2, tokens, 3)).astype(np.float32)
    return metric, x, rng.integers(1, 50, (2, tokens)).astype(np.float32), r, prefix


@settings(max_examples=20, deadline=None)
@given(merges(), st.sampled_from(sorted(MATCH)))
def test_merging_against_numpy(case, target):
    metric, x, sizes, r, prefix = case
    with compiled_for(target):
        matching = MATCH[target](jnp.asarray(metric), r=r, prefix=prefix)
    merged, merged_sizes = merge_tokens(jnp.asarray(x), jnp.asarray(sizes), matching)
    unmerged = unmerge_tokens(merged, matching)
    for image in range(2):
        places, left = reference_matching(metric[image].astype(np.float64), r, prefix)
        np.testing.assert_array_equal(matching.places[image], places)
        holds = np.eye(left)[places].T
        total = holds @ sizes[image]
        expected = holds @ (sizes[image, :, None] * x[image]) / total[:, None]
        np.testing.assert_array_equal(merged_sizes[image], total)
        np.testing.assert_allclose(merged[image], expected, atol=1e-5)
        np.testing.assert_allclose(unmerged[image], expected[places], atol=1e-5)


def test_bfloat16_tokens_are_averaged_in_float32():
    rng = np.random.default_rng(0)
    metric = jnp.asarray(rng.normal(size=(2, 33, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 33, 16)), jnp.bfloat16)
    sizes = jnp.asarray(rng.integers(1, 300, (2, 33)), jnp.float32)
    matching = match_tokens(metric, r=9)
    merged, merged_sizes = merge_tokens(x, sizes, matching)
    exact, _ = merge_tokens(x.astype(jnp.float32), sizes, matching)
    assert merged.dtype == jnp.bfloat16 and merged_sizes.dtype == jnp.float32
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))


def test_sizes_that_tf32_does_not_hold_add_up_exactly():
    """A mean takes them as TF32 has them, so that equal tokens stay what they are."""
    x = jnp.array([[[1, 3], [3, 3]]], jnp.float16)
    matching = match_tokens(x, r=1, prefix=0)
    merged, sizes = jax.jit(merge_tokens)(x, jnp.array([[2049.0, 2052.0]]), matching)
    assert merged.tolist() == [[[2, 3]]] and sizes.tolist() == [[4101]]


def test_groups_of_bfloat16_tokens_are_averaged_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 33, 16)), jnp.bfloat16)
    weights = rng.uniform(0.5, 300, (2, 33)).astype(np.float32)
    places = rng.permutation(33) % 10
    means = merging.merge_groups(
        x, jnp.asarray(weights), jnp.asarray(np.stack([places] * 2)), tokens=10
    )
    holds = weights[:, None] * (places == np.arange(10)[:, None])
    exact = holds @ np.asarray(x, np.float64) / holds.sum(-1, keepdims=True)
    # Half of the last of bfloat16's 8 bits, and the weights' 11 bits.
    np.testing.assert_allclose(np.asarray(means, np.float64), exact, rtol=2**-8, atol=2**-9)


def test_merging_adds_up_without_scattering():
    def merge(metric, x, sizes):
        return merge_tokens(x, sizes, match_tokens(metric, r=4))

    program = jax.make_jaxpr(merge)(jnp.ones((1, 17, 2)), jnp.ones((1, 17, 2)), jnp.ones((1, 17)))
    assert "gather" in str(program) and "scatter-add" not in str(program)


def test_gradient_flows_through_values_but_not_through_the_choice():
    rng = np.random.default_rng(0)
    metric = jnp.asarray(rng.normal(size=(1, 9, 4)), jnp.float32)

    def total(metric, x):
        merged, _ = merge_tokens(x, jnp.ones(x.shape[:2]), match_tokens(metric, r=2))
        return (merged**2).sum()

    by_metric, by_value = jax.grad(total, argnums=(0, 1))(metric, metric)
    assert not by_metric.any()
    assert np.isfinite(by_value).all() and (by_value != 0).all()


@pytest.mark.parametrize(
    ("r", "blocks", "expected"),
    [
        (8, 3, (8, 8, 8)),
        (0, 2, (0, 0)),
        ([4, 3], 4, (4, 3, 0, 0)),
        ((), 2, (0, 0)),
        ((8, 1), 2, (8, 1)),
        ((8, 1.0), 2, (0, 16)),
        ((8, 0.0), 3, (8, 8, 8)),
        ((8, -1.0), 5, (16, 12, 8, 4, 0)),
        ((3, 0.5), 4, (1, 2, 3, 5)),
        ((5, 0.0), 1, (5,)),
    ],
)
def test_merge_counts(r, blocks, expected):
    assert merge_counts(r, blocks) == expected


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "r=-1: .* at least 0"),
        ([3, -2], "r=.*-2.* at least 0"),
        ((8, -1), r"r=\(8, -1\): .* at least 0; an inflection needs a point, such as \(8, -1.0\)"),
        ((-3, 0.5), "at least 0"),
        ((8, 1.5), "1.5.* between -1 and 1"),
        ([1] * 7, "lists 7 numbers, the model has 6 blocks"),
    ],
)
def test_bad_merge_counts(r, message):
    with pytest.raises(InputError, match=message):
        merge_counts(r, 6)


def test_parity_schedules(goldens):
    if not goldens.cases("tome_parse_r"):
        pytest.skip("no schedules in this golden folder")
    for written, schedule in json.loads(str(goldens.ops[first_field(goldens, "tome_parse_r")])):
        r = ast.literal_eval(written)
        r = (r[0], float(r[1])) if isinstance(r, tuple) else r
        assert merge_counts(r, len(schedule)) == tuple(schedule), written


def first_field(goldens, case):
    return next(key for key in goldens.ops if key.split("/")[0] == case)


def test_parity_merging(goldens):
    cases = [name for name in goldens.cases("tome_r") if re.fullmatch(r"tome_r\d+_cls[01]", name)]
    if not cases:
        pytest.skip("no merging by ToMe in this golden folder")
    for name in cases:
        r, class_token = map(int, re.findall(r"\d+", name))
        fields = {key: jnp.asarray(value) for key, value in goldens.case(name).items()}
        matching = match_tokens(fields["metric"], r=r, prefix=class_token)
        merged, sizes = merge_tokens(fields["x"], fields["size"][..., 0], matching)
        source = jax.nn.one_hot(matching.places, merged.shape[1], axis=1)
        np.testing.assert_array_equal(source, fields["source"], err_msg=name)
        np.testing.assert_allclose(merged, fields["merged"], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(sizes, fields["merged_size"][..., 0], rtol=1e-6, err_msg=name)
        unmerged = unmerge_tokens(fields["merged"], matching)
        np.testing.assert_allclose(unmerged, fields["unmerged"], atol=0, err_msg=name)


def test_schedules_that_end_at_zero_are_accepted():
    for r in range(60):
        for blocks in (1, 2, 8, 12, 24, 32):
            counts = merge_counts((r, -1.0), blocks)
            assert len(counts) == blocks and counts[0] == 2 * r and min(counts) >= 0


def test_positions_are_32_bit_whatever_the_default():
    """A state keeps its types through a block, as a scan over blocks needs."""
    with jax.enable_x64(True):
        matching = match_tokens(jnp.ones((2, 9, 4)), r=3)
    assert {leaf.dtype for leaf in jax.tree.leaves(matching)} == {jnp.dtype("int32")}


def test_our_kernel_has_the_gradient_of_merging_and_layer_norm():
    rng = np.random.default_rng(0)
    x, sizes = rng.normal(size=(2, 9, 4)), rng.integers(1, 9, (2, 9)).astype(np.float32)
    weights, matching = rng.normal(size=(2, 7, 4)), match_tokens(jnp.asarray(x), r=2)
    given = (*(jnp.asarray(each, jnp.float32) for each in (x, sizes)), jnp.ones(4), jnp.zeros(4))

    def by_kernel(x, sizes, scale, bias):
        merged, _, normed = merging.merge_and_normalise(
            x, sizes, matching, scale, bias, epsilon=1e-6, dtype=x.dtype
        )
        return (weights * (merged + normed)).sum()

    def in_turn(x, sizes, scale, bias):
        merged, _ = merge_tokens(x, sizes, matching)
        return (weights * (merged + layer_norm(merged, scale, bias, epsilon=1e-6))).sum()

    for found, expected in zip(
        jax.grad(by_kernel, range(4))(*given), jax.grad(in_turn, range(4))(*given), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
