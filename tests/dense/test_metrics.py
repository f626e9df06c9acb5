"""Scores of maps, against the original code's and by hand."""

import numpy as np
import pytest

from hvit_jax.dense.metrics import Depth, Segmentation, class_names
from tests.dense_golden import DenseGoldens

GOLDENS = DenseGoldens()
MIOU = [name for name in GOLDENS.description["configs"] if name.startswith("miou")]


@pytest.mark.parametrize("name", MIOU)
def test_dense_parity_of_miou(name):
    about = GOLDENS.description["configs"][name]
    stored = {
        key.split("/")[1]: GOLDENS.arrays[key]
        for key in GOLDENS.arrays.files
        if key.startswith(f"{name}/")
    }
    truth = stored["truth"].astype(int)
    if about["reduce_zero_label"]:
        truth = np.where(truth == 0, 255, np.where(truth == 255, 255, truth - 1))
    metric = Segmentation(class_names(about["classes"], ()))
    pairs = zip(stored["predictions"].astype(int), truth, strict=True)
    scores = metric.scores(sum(metric.measure(*pair) for pair in pairs), len(truth))
    for key, wanted in (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")):
        assert scores[key] == pytest.approx(100 * about[wanted], abs=1e-9)
    for key, wanted in (("iou", "IoU"), ("acc", "Acc")):
        found = [np.nan if each[key] is None else each[key] for each in scores["classes"]]
        np.testing.assert_allclose(found, 100 * stored[wanted], atol=1e-9)


def test_depth_by_hand():
    metric = Depth(0.1, 10.0)
    truth = np.array([[2.0, 4.0], [0.0, 20.0]])  # No truth, and beyond the range.
    measured = metric.measure(np.array([[2.4, 3.0], [7.0, 7.0]]), truth)
    rmse, abs_rel = np.sqrt((0.4**2 + 1) / 2), (0.2 + 0.25) / 2
    np.testing.assert_allclose(measured, [rmse, abs_rel, 0.5, 1])
    nothing = metric.measure(np.ones((2, 2)), np.zeros((2, 2)))
    scores = metric.scores(measured + nothing, 2)
    assert scores["rmse"] == pytest.approx(rmse) and scores["delta1"] == 0.5
    assert metric.scores(nothing, 1)["rmse"] is None
