"""Selection of tokens: literal cases, properties against NumPy, and the original's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvit_jax.ops import selection
from hvit_jax.ops.selection import kept_tokens, running_score
from tests.golden import Goldens

# One program each: operations on their own take longer to compile, one by one.
descending_order = jax.jit(selection.descending_order)
keep_best = jax.jit(selection.keep_best, static_argnames=("keep", "fuse", "prefix"))
best_places = jax.jit(selection.best_places, static_argnames=("keep", "fuse", "prefix"))
new_places = jax.jit(selection.new_places, static_argnames="prefix")
take_tokens = jax.jit(selection.take_tokens, static_argnames="prefix")
put_tokens = jax.jit(selection.put_tokens, static_argnames="prefix")

GOLDEN_CASES = Goldens().cases("evit_")


def tokens(batch, count, width=3):
    return np.random.default_rng(count).normal(size=(batch, count, width)).astype(np.float32)


@st.composite
def scored_patches(draw):
    """Scores of a few values only, so that ties are common, and how many to keep."""
    patches = draw(st.sampled_from((1, 5, 12)))
    levels = draw(st.lists(st.integers(0, 5), min_size=2 * patches, max_size=2 * patches))
    keep = draw(st.sampled_from((1, (patches + 1) // 2, patches)))
    return np.asarray(levels, np.float32).reshape(2, patches) / 4, keep


@pytest.mark.parametrize(
    ("rate", "patches", "kept"),
    [(0.7, 10, 7), (0.7, 11, 8), (1.0, 9, 9), (0.01, 5, 1), (0.07, 100, 8), (0.8, 820, 656)],
)
def test_kept_tokens_round_up_in_float64(rate, patches, kept):
    # 0.07 * 100 is a little above 7 in float64, and the original rounds just that up.
    assert kept_tokens(rate, patches) == kept


def test_order_and_places_by_hand():
    scores = jnp.array([[0.1, 0.4, 0.2, 0.4]])
    order = descending_order(scores)
    assert order.tolist() == [[1, 3, 2, 0]]
    assert new_places(order, prefix=1).tolist() == [[0, 4, 1, 3, 2]]
    assert best_places(order, keep=2, prefix=1).tolist() == [[0, -1, 1, -1, 2]]
    assert best_places(order, keep=2, fuse=True, prefix=1).tolist() == [[0, 3, 1, 3, 2]]
    assert best_places(order, keep=4, fuse=True, prefix=1).tolist() == [[0, 4, 1, 3, 2]]


def test_keep_best_by_hand():
    x = jnp.array([[[9.0, 9.0], [1.0, 0.0], [2.0, 0.0], [3.0, 4.0], [4.0, 8.0]]])
    scores = jnp.array([[0.4, 0.3, 0.25, 0.5]])
    order = descending_order(scores)
    kept = [[9.0, 9.0], [4.0, 8.0], [1.0, 0.0]]
    assert keep_best(x, scores, order, keep=2, prefix=1).tolist() == [kept]
    fused = [0.3 * 2 + 0.25 * 3, 0.25 * 4]
    np.testing.assert_allclose(
        keep_best(x, scores, order, keep=2, fuse=True, prefix=1), [[*kept, fused]], rtol=1e-6
    )


def test_running_score_by_hand():
    old, new = jnp.array([[0.5, 0.25]]), jnp.array([[0.25, 0.75]])
    np.testing.assert_allclose(running_score(old, new, tradeoff=0.2), [[0.45, 0.35]], rtol=1e-6)
    np.testing.assert_array_equal(running_score(old, new, tradeoff=0.0), old)
    np.testing.assert_array_equal(running_score(old, new, tradeoff=1.0), new)


@settings(max_examples=30, deadline=None)
@given(scored_patches())
def test_order_is_numpys_stable_one(case):
    scores, _ = case
    order = np.asarray(descending_order(jnp.asarray(scores)))
    for row, expected in zip(order, scores, strict=True):
        ranked = sorted(range(len(expected)), key=lambda index: (-expected[index], index))
        assert row.tolist() == ranked


@settings(max_examples=30, deadline=None)
@given(scored_patches(), st.booleans())
def test_keep_best_equals_numpy(case, fuse):
    scores, keep = case
    x = tokens(2, scores.shape[1] + 1)
    order = descending_order(jnp.asarray(scores))
    got = np.asarray(
        keep_best(jnp.asarray(x), jnp.asarray(scores), order, keep=keep, fuse=fuse, prefix=1)
    )
    assert got.shape == (2, 1 + keep + fuse, x.shape[2])
    for image, weights, rows in zip(x, scores, got, strict=True):
        ranked = np.argsort(-weights, kind="stable")
        best, rest = ranked[:keep], ranked[keep:]
        expected = [image[0], *image[1:][best]]
        if fuse:
            expected.append((weights[rest, None] * image[1:][rest]).sum(0))
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(scored_patches(), st.booleans())
def test_places_lead_to_where_tokens_went(case, fuse):
    scores, keep = case
    x = tokens(2, scores.shape[1] + 1)
    order = descending_order(jnp.asarray(scores))
    moved = np.asarray(take_tokens(jnp.asarray(x), order, prefix=1))
    np.testing.assert_array_equal(
        np.take_along_axis(moved, np.asarray(new_places(order, prefix=1))[..., None], axis=1), x
    )
    kept = np.asarray(
        keep_best(jnp.asarray(x), jnp.asarray(scores), order, keep=keep, fuse=fuse, prefix=1)
    )
    places = np.asarray(best_places(order, keep=keep, fuse=fuse, prefix=1))
    for image, rows, where in zip(x, kept, places, strict=True):
        survivors = (where >= 0) & (where <= keep)
        assert survivors.sum() == keep + 1
        np.testing.assert_array_equal(rows[where[survivors]], image[survivors])
        assert set(where[~survivors].tolist()) <= {keep + 1 if fuse else -1}


def test_bfloat16_fuses_in_float32():
    x = jnp.asarray(tokens(1, 400)).astype(jnp.bfloat16)
    scores = jnp.full((1, 399), 1 / 400)
    fused = keep_best(x, scores, descending_order(scores), keep=1, fuse=True, prefix=1)[:, -1]
    assert fused.dtype == jnp.bfloat16
    exact = np.asarray(x[:, 2:], np.float64).sum(1) / 400
    np.testing.assert_allclose(np.asarray(fused, np.float64), exact, rtol=2**-8, atol=1e-4)


def test_tokens_are_put_back_where_they_were_found():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 10, 4)))
    order = descending_order(x[:, 1:, 0])[:, :4]
    taken = take_tokens(x, order, prefix=1)
    np.testing.assert_array_equal(put_tokens(x, order, taken, prefix=1), x)
    new = put_tokens(x, order, taken + 1, prefix=1)
    changed = np.asarray(new != x).all(-1)
    assert changed.sum(1).tolist() == [5, 5, 5] and changed[:, 0].all()
    np.testing.assert_array_equal(take_tokens(new, order, prefix=1), taken + 1)


def test_selecting_adds_up_without_scattering():
    def select(x, scores):
        return keep_best(x, scores, descending_order(scores), keep=5, fuse=True, prefix=1)

    program = jax.make_jaxpr(select)(jnp.zeros((2, 10, 4)), jnp.zeros((2, 9)))
    assert "scatter-add" not in str(program)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_parity_selection(name, goldens):
    case = goldens.case(name)
    scores = jnp.asarray(case["attn_mean_heads"]).mean(1)[:, 1:]
    np.testing.assert_allclose(scores, case["scores"], atol=1e-6)
    keep = case["kept"].shape[1]
    assert keep == kept_tokens(float(name.split("_")[1]), case["x"].shape[1] - 1)
    order = descending_order(scores)
    np.testing.assert_array_equal(order[:, :keep], case["kept"])
    x = jnp.asarray(case["x"])
    np.testing.assert_array_equal(keep_best(x, scores, order, keep=keep, prefix=1), case["out"])
    fused = keep_best(x, scores, order, keep=keep, fuse=True, prefix=1)
    np.testing.assert_allclose(fused, case["out_fused"], atol=1e-5)
