"""What benchmarks/stamps.py measures, and how its scenes are labelled."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def benchmarks():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import stamp_scenes
    import stamps

    yield stamps, stamp_scenes
    sys.path.pop(0)


def test_boundary_f1(benchmarks):
    """Outlines within 2 pixels are right, whatever is inside; unlabelled rims have no side."""
    f1 = benchmarks[0].boundary_f1
    truth = np.zeros((1, 40, 40), np.int32)
    truth[0, 10:30, 10:30] = 1
    assert f1(truth, truth) == 100
    assert f1(np.roll(truth, 2, 2), truth) == 100
    assert f1(np.roll(truth, 5, 2), truth) < 80
    assert f1(0 * truth, truth) == 0
    rim = truth.copy()
    rim[0, 9:31, 9:31] = 255
    rim[0, 11:29, 11:29] = 1
    assert f1(truth, rim) == 100


def test_labels_of_a_scene(benchmarks):
    """A red stamp: its pixels have its class, its half transparent edge has none."""
    scenes = benchmarks[1]
    pixels = np.zeros((80, 80, 4), np.uint8)
    pixels[..., 0], pixels[20:60, 20:60, 3] = 255, 255
    pixels[18:20, 20:60, 3] = 128
    stamps = [[Image.fromarray(pixels)] for _ in scenes.CLASSES]
    picture, labels = scenes.Scenes(stamps, 64, np.random.default_rng(0)).draw()
    picture, labels = np.asarray(picture), np.asarray(labels)
    assert picture.shape == (64, 64, 3) and labels.shape == (64, 64)
    inside = (labels > 0) & (labels < 255)
    assert inside.any() and (labels == 255).any()
    assert (picture[inside][:, 0] > 220).all() and (picture[inside][:, 1:] < 35).all()


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("animals/mammals/bovines", "bovine"),
        ("animals/mammals/cats", "mammal"),
        ("animals/mammals/aquatic", "fish"),
        ("hobbies/music/string", "instrument"),
        ("vehicles/construction/cartoon", None),
        ("space/planets", None),
    ],
)
def test_classes_go_by_folders(benchmarks, folder, name):
    scenes = benchmarks[1]
    label = scenes.class_of(Path(folder, "stamp.png"))
    assert (None if label is None else scenes.CLASSES[label]) == name
