"""Where training starts: what becomes of a checkpoint's head."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hvit_jax import InputError
from hvit_jax.checkpoint import load_parameters, read_description
from hvit_jax.reducers import make_reducer
from hvit_jax.training import TrainConfig
from hvit_jax.training.start import begin, find_validation, name_method_before
from tests.evaluation_setup import CONFIG, make_checkpoint
from tests.small_models import with_registers, without_class_token
from tests.training_setup import command, make_data, train
from tests.training_setup import parameters as trained_parameters

NAMES = tuple("abcdefg")


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "checkpoint", classes=NAMES)


def start(checkpoint, classes, **options):
    config = TrainConfig("data", Path("run"), checkpoint=checkpoint, seed=3, **options)
    return begin(config, classes)


def test_only_a_checkpoint_trained_with_a_method_is_said_to_be(tmp_path, checkpoint):
    trained = make_checkpoint(tmp_path / "trained", trained=make_reducer("evit"))
    line = "the checkpoint was trained with evit; this run trains with dense"
    for folder, lines in ((trained, [line]), (checkpoint, []), (None, [])):
        sizes = {"model": "vit_b16"} if folder is None else {"checkpoint": folder}
        assert name_method_before(TrainConfig("data", Path("run"), **sizes)) == lines


def validation(data, val=None, classes=("dark", "light")):
    config = TrainConfig(str(data), Path("run"), model="vit_b16", val=val)
    return find_validation(config, classes)


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
    begun, parameters, note = start(checkpoint, ("a", "z"))
    assert begun.config.num_classes == 2 and parameters["head"]["kernel"].shape == (CONFIG.width, 2)
    assert note == "a new head for 2 classes; the checkpoint has 7"
    assert start(checkpoint, NAMES[:2], new_head=True)[2] == note
    with pytest.raises(InputError, match="no head for the data's 2 classes, so its dense model"):
        start(checkpoint, ("a", "z"), distill=True, reducer=make_reducer("evit"))


def test_some_of_the_checkpoints_classes_keep_their_outputs(checkpoint):
    begun, parameters, note = start(checkpoint, ("f", "b"))
    stored = load_parameters(checkpoint, CONFIG)["head"]
    assert begun.config.num_classes == 2 and begun.classes == ("f", "b")
    for name, leaf in stored.items():
        np.testing.assert_array_equal(parameters["head"][name], leaf[..., [5, 1]])
    assert note == (
        "the head keeps its outputs for the data's 2 classes, of 7 (--new-head starts with a new "
        "one)"
    )


def test_a_checkpoint_without_a_head_gets_one_in_place_of_its_projection(tmp_path):
    for projection in (0, 4):
        config = replace(CONFIG, num_classes=0, projection=projection)
        checkpoint = make_checkpoint(tmp_path / str(projection), config)
        begun, parameters, note = start(checkpoint, ("a", "b"))
        assert begun.config == replace(CONFIG, num_classes=2)
        assert parameters["head"]["kernel"].shape == (CONFIG.width, 2)
        assert "projection" not in parameters
        more = "; its projection to 4 channels is left out" * (projection > 0)
        assert note == f"a new head for 2 classes; the checkpoint has none{more}"


def test_both_heads_of_a_distilled_model_change(tmp_path):
    config = replace(CONFIG, distillation_token=True, position_prefix=2, pool="two heads")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config, NAMES)
    stored = load_parameters(checkpoint, config)
    for names, new in ((("f", "b"), False), (("x", "y"), True)):
        _, parameters, _ = start(checkpoint, names)
        for head in ("head", "distillation_head"):
            kernel = parameters[head]["kernel"]
            assert kernel.shape == (CONFIG.width, 2)
            assert np.array_equal(kernel, stored[head]["kernel"][:, [5, 1]]) is not new


@pytest.mark.parametrize(
    ("make", "words", "moved"),
    [
        (with_registers, ("--layer-decay", "0.8"), {"register_tokens", "head", "ln"}),
        (without_class_token, ("--train", "head"), {"head"}),
    ],
)
def test_other_backbones_learn(tmp_path, make, words, moved):
    config = make(CONFIG)
    checkpoint, data = make_checkpoint(tmp_path / "from", config), make_data(tmp_path / "data")
    recipe = "--epochs 3 -b 8 --warmup-epochs 0".split()
    out = ["--output", tmp_path / "run"]
    assert command([data, *out, "--checkpoint", checkpoint, *recipe, *words]) == 0
    before, after = load_parameters(checkpoint, config), trained_parameters(tmp_path / "run")
    same = {name for name in before if trees_equal(before[name], after[name])}
    assert not same & moved and (words[0] == "--layer-decay" or same == set(before))
    assert read_description(tmp_path / "run" / "checkpoint").classes == ("dark", "light")
    if config.qkv_bias == "qv":  # Keys still have no bias.
        bias = after["blocks"]["in_proj"]["bias"].reshape(-1, 3, config.width)
        assert np.all(bias[:, 1] == 0) and np.all(bias[:, 0] != 0)


def trees_equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_order_goes_before_names(checkpoint):
    _, parameters, note = start(checkpoint, NAMES[::-1], order=True)
    stored = load_parameters(checkpoint, CONFIG)["head"]
    np.testing.assert_array_equal(parameters["head"]["kernel"], stored["kernel"])
    assert note is not None and "in their order, g to a (" in note


def test_a_test_set_is_not_validated_on_unless_it_is_named(tmp_path):
    make_data(tmp_path, validation=1)
    (tmp_path / "val").rename(tmp_path / "Test")
    found, notes = validation(tmp_path)
    test = tmp_path / "Test"
    assert found is None
    assert notes == [f"no validation: Test/ is for the end (--val {test} uses it)"]
    found, notes = validation(tmp_path, str(test), ("light", "dark"))
    assert found is not None and len(found) == 2 and notes == []
    (tmp_path / "validation" / "dark").mkdir(parents=True)
    (tmp_path / "validation" / "light").mkdir()
    shutil.copy(test / "dark" / "0.png", tmp_path / "validation" / "dark")
    found, notes = validation(tmp_path)
    assert found is not None and found.paths == ("validation/dark/0.png",)
    assert notes == ["reading validation/, not Test/", "no pictures in a class: light"]


def test_one_class_is_refused(tmp_path, capsys):
    data = make_data(tmp_path / "data", classes=("images",))
    assert train(data, tmp_path / "run") == 2
    assert "has one class, images; training needs at least two" in capsys.readouterr().err
