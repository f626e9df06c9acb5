"""Where training starts: what becomes of a checkpoint's head."""

import numpy as np
import pytest

from hvit_jax import InputError
from hvit_jax.checkpoint import load_parameters
from hvit_jax.training.start import from_checkpoint
from tests.evaluation_setup import CONFIG, make_checkpoint

NAMES = tuple("abcdefg")


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint", classes=NAMES)


def start(checkpoint, classes, **options):
    return from_checkpoint(checkpoint, classes, seed=3, **options)


def test_outputs_follow_the_names_of_their_classes(checkpoint):
    begun, parameters, note = start(checkpoint, NAMES[::-1])
    stored = load_parameters(checkpoint, CONFIG)["head"]
    assert (begun.config, begun.classes, note) == (CONFIG, NAMES[::-1], None)
    for name, leaf in stored.items():
        np.testing.assert_array_equal(parameters["head"][name], leaf[..., ::-1])


def test_other_names_go_by_their_order_where_that_is_said(checkpoint):
    with pytest.raises(InputError, match="only the data has A, only the checkpoint has g"):
        start(checkpoint, ("A", *NAMES[:-1]))
    _, parameters, note = start(checkpoint, tuple("ABCDEFG"), order=True)
    stored = load_parameters(checkpoint, CONFIG)["head"]
    np.testing.assert_array_equal(parameters["head"]["kernel"], stored["kernel"])
    assert note is not None and "in their order, A to G (" in note
    assert start(checkpoint, tuple("0123456"))[2] is not None
    _, parameters, note = start(checkpoint, tuple("ABCDEFG"), new_head=True)
    assert parameters["head"]["kernel"].shape == stored["kernel"].shape
    assert np.any(parameters["head"]["kernel"] != stored["kernel"])
    assert note == "a new head for 7 classes; the checkpoint has 7"


def test_a_checkpoint_without_names_has_the_classes_in_their_order(tmp_path):
    unnamed = make_checkpoint(tmp_path / "unnamed")
    begun, parameters, note = start(unnamed, tuple("ABCDEFG"))
    stored = load_parameters(unnamed, CONFIG)["head"]
    np.testing.assert_array_equal(parameters["head"]["kernel"], stored["kernel"])
    assert begun.classes == tuple("ABCDEFG") and note is not None and "A to G (" in note


def test_another_number_of_classes_gets_a_new_head(checkpoint):
    with pytest.raises(InputError, match="--order: the data has 2 classes, .* head has 7"):
        start(checkpoint, NAMES[:2], order=True)
    begun, parameters, note = start(checkpoint, NAMES[:2])
    assert begun.config.num_classes == 2 and parameters["head"]["kernel"].shape == (CONFIG.width, 2)
    assert note == "a new head for 2 classes; the checkpoint has 7"
