"""A checkpoint that was trained with a method is evaluated with it, unless another is named."""

import json

import numpy as np
import pytest

import hvit_jax
from hvit_jax.checkpoint import Description, choose_method
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop
from tests.evaluation_setup import (
    CONFIG,
    evaluate,
    main,
    make_checkpoint,
    make_pictures,
    results_of,
)

EVIT = hvit_jax.make_reducer("evit", keep_rate=0.4, drop_locations=(1,))
LINE = (
    "trained with evit keep_rate=0.4 drop_locations=1, which is used; --method dense runs the "
    "dense model\n"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("trained") / "checkpoint", trained=EVIT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def logits(checkpoint, pictures, method):
    source, model = read_folder(pictures), hvit_jax.load(checkpoint, method)
    pixels = [resize_and_crop(source.open(index), CONFIG.image_shape) for index in range(10)]
    return np.asarray(hvit_jax.jit_model(model)(normalize(np.stack(pixels))))


@pytest.mark.parametrize(
    ("words", "method", "told"),
    [
        ((), EVIT, True),
        (("--method", "dense"), "dense", False),
        (("--method", "tome"), "tome", False),
    ],
)
def test_the_method(tmp_path, checkpoint, pictures, capsys, words, method, told):
    results, found = results_of(pictures, checkpoint, tmp_path, *words)
    assert (LINE in capsys.readouterr().err) is told
    np.testing.assert_allclose(found["logits"], logits(checkpoint, pictures, method), atol=1e-5)
    reducer = hvit_jax.make_reducer(method).resolve(CONFIG)
    assert (results["method"], results["args"]) == (reducer.name, reducer.options())


def test_verified_and_resumed(tmp_path, checkpoint, pictures, capsys):
    results_of(pictures, checkpoint, tmp_path)
    file, files = tmp_path / "results.json", ("--predictions", tmp_path / "predictions.npz")
    capsys.readouterr()
    assert main(["--verify", str(file), "-j", "0", "--output", str(tmp_path / "again.json")]) == 0
    printed = capsys.readouterr()
    assert "verified" in printed.out and "trained with" not in printed.err
    assert json.loads((tmp_path / "again.json").read_text())["method"] == "evit"
    resume = (*files, "--output", file, "--resume")
    assert evaluate(pictures, checkpoint, *resume) == 0
    assert "results.json is complete" in capsys.readouterr().err
    assert evaluate(pictures, checkpoint, *resume, "--method", "dense") == 2
    assert "was begun with --method evit, now dense" in capsys.readouterr().err


def test_a_method_of_another_release():
    description = Description(CONFIG, {"format": "hvit train", "method": "evit2", "args": {}})
    with pytest.raises(hvit_jax.InputError, match="evit2.*choose a --method"):
        choose_method(None, description, print)
    assert choose_method(EVIT, description, print) is EVIT


@pytest.mark.parametrize("source", [{}, {"format": "hvit train", "method": "dense", "args": {}}])
def test_converted_and_trained_dense(source, capsys):
    tome, description = hvit_jax.make_reducer("tome"), Description(CONFIG, source)
    assert choose_method(None, description, print).name == "dense"
    assert choose_method(None, description, print, tome) is tome
    assert capsys.readouterr().out == ""
