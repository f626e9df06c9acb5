"""Scores of draws, and their intervals, beside values computed by hand."""

import numpy as np
import pytest

from hvit_jax.comparing.scores import DRAWS, SCORES, draws, interval, value_of, values_of_draws


def test_draws_are_always_the_same_and_of_all_pictures():
    found = draws(7)
    assert found.shape == (DRAWS, 7) and (found.sum(1) == 7).all()
    again = np.random.default_rng(0)
    for row in found[:3]:
        places = again.integers(7, size=7)
        assert row.tolist() == [(places == picture).sum() for picture in range(7)]


def test_accuracy_of_draws_by_hand():
    right = np.array([True, False, True, True])
    assert value_of(SCORES["top1"], right) == 75.0
    found = values_of_draws(SCORES["top1"], right)
    expected = [100 * row[[0, 2, 3]].sum() / 4 for row in draws(4)]
    assert found == pytest.approx(expected)
    # Of 1,000 the 25th and the 975th value, between which percentiles interpolate.
    low, high = np.sort(expected)[[24, 975]]
    assert interval(found) == pytest.approx([low, high], abs=1e-9)


def test_differences_on_the_same_pictures_are_better_known_than_either():
    """Two settings that differ in one of 100 pictures."""
    before = np.arange(100) < 60
    after = before.copy()
    after[0] = False
    drawn = [values_of_draws(SCORES["top1"], each) for each in (before, after)]
    alone, apart = interval(drawn[1]), interval(drawn[1] - drawn[0])
    assert -4 < apart[0] < 0 and apart[1] == 0 and alone[1] - alone[0] > 15


def test_miou_of_draws_by_hand():
    """Two pictures of two classes; the second class is in the second picture only."""
    counts = np.array([[[3, 0], [4, 0], [4, 0]], [[1, 1], [2, 2], [1, 3]]])
    score = SCORES["miou"]
    # Agreeing 4 and 1, predicted 6 and 2, true 5 and 3: 4 / 7 and 1 / 4.
    assert value_of(score, counts) == pytest.approx(50 * (4 / 7 + 1 / 4))
    of_draw = {(2, 0): 100 * 6 / 10, (1, 1): 50 * (4 / 7 + 1 / 4), (0, 2): 50 * (1 / 2 + 1 / 4)}
    expected = [of_draw[tuple(row.tolist())] for row in draws(2)]
    assert values_of_draws(score, counts) == pytest.approx(expected)


def test_depth_of_pictures_without_a_true_pixel_does_not_count():
    errors = np.array([[0.5, 0, 0, 1], [0, 0, 0, 0], [0.1, 0, 0, 1]])
    assert value_of(SCORES["rmse"], errors) == pytest.approx(0.3)
    assert SCORES["rmse"].tolerated(0.3) == pytest.approx(0.015)
    assert SCORES["miou"].tolerated(40.0) == 1.0 and SCORES["agreement"].tolerated(100.0) == 5.0
