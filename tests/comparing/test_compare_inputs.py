"""A comparison reads labels and prepares pictures as `hvit eval` with the same options."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import hvit_jax
from hvit_jax.commands.compare import main
from hvit_jax.comparing import compare
from hvit_jax.comparing.classifying import cosines, kl_divergence, leave_one_out
from hvit_jax.comparing.scores import SCORES, values_of_draws
from hvit_jax.comparing.settings import Setting
from hvit_jax.comparing.trials import Trials
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.pictures import Preprocessing
from tests.comparing.test_compare import configured, twice_as_fast
from tests.evaluation_setup import CONFIG, make_checkpoint, make_pictures, results_of

NAMES = tuple("abcdefg")


def drawn(right):
    """The draws of top-1 that a row has whose pictures are right or not."""
    return ",".join(f"{each:.6g}" for each in values_of_draws(SCORES["top1"], right))


def compared(tmp_path, *words, settings=None):
    """Rows of a comparison, and what stands beside them."""
    output = ["--output", str(tmp_path / "compare.json")]
    bench = functools.partial(Trials, timer=twice_as_fast)
    compare(configured(*words, "-j", "0", *output), settings=settings, bench=bench)
    written = json.loads((tmp_path / "compare.json").read_text())
    return written["rows"], written


def test_labels_and_preprocessing_are_those_of_an_evaluation(tmp_path, capsys):
    """Several right labels a picture, some of the classes, pictures cut more tightly."""
    own = Preprocessing(0.8, "squash", "timm", "bilinear", (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", classes=NAMES, preprocessing=own)
    data = make_pictures(tmp_path / "data")
    labels = {f"{index:03d}": ["a", "bcd"[index % 3]] if index else [] for index in range(10)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    words = ["--labels", str(tmp_path / "labels.json"), "--subset", "--crop-pct", "0.5"]
    results, found = results_of(data, checkpoint, tmp_path, *words)
    inputs = [str(data), "--checkpoint", str(checkpoint), "-j", "0", "--seconds", "0.001"]
    output = ["--output", str(tmp_path / "compare.json"), "--max-drop", "100"]
    bench = functools.partial(Trials, timer=twice_as_fast)
    settings = [Setting(hvit_jax.make_reducer("tome", r=1))]
    compare(configured(*inputs, *words, *output), settings=settings, bench=bench)
    printed = capsys.readouterr()
    assert "left out: pictures without a right label (1)" in printed.err
    assert "only outputs of the data's 4 classes compete, of 7" in printed.err
    assert f"--labels {tmp_path / 'labels.json'} --subset" in printed.out
    assert "--crop-pct 0.5" in printed.out
    written = json.loads((tmp_path / "compare.json").read_text())
    for name in ("preprocessing", "labels", "labels_sha256", "data_sha256"):
        assert written[name] == results[name], name
    (dense,) = [row for row in written["rows"] if row["method"] == "dense"]
    for name in ("top1", "top5"):
        assert dense["scores"][name]["value"] == results[name]
    assert 0 < results["top1"] <= 100
    right = (found["labels"] == found["top1"][:, None]).any(-1)
    assert dense["draws"] == drawn(right)
    assert set(np.unique(found["top1"])) <= {0, 1, 2, 3}


def test_a_probe_is_trained_on_the_dense_model(tmp_path, capsys):
    """The dense model has the top-1 of an evaluation; the others are judged by the same probe."""
    config = dataclasses.replace(CONFIG, num_classes=0)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    data = make_pictures(tmp_path / "data")
    probe = ["--probe", "knn", "--train-data", str(data), "--probe-k", "2"]
    results, found = results_of(data, checkpoint, tmp_path, *probe)
    inputs = [str(data), "--checkpoint", str(checkpoint), "-j", "0", "--seconds", "0.001"]
    output = ["--output", str(tmp_path / "compare.json"), "--max-drop", "100"]
    scored = []

    def bench(whole, seconds):
        scored.append(whole.scoring.head)
        return Trials(whole, seconds, twice_as_fast)

    settings = [Setting(hvit_jax.make_reducer("evit", keep_rate=0.5))]
    compare(configured(*inputs, *probe, *output), settings=settings, bench=bench)
    assert f"--probe knn --train-data {data} --probe-k 2" in capsys.readouterr().out
    written = json.loads((tmp_path / "compare.json").read_text())
    dense, evit = written["rows"]
    assert dense["scores"]["top1"]["value"] == results["top1"]
    assert dense["draws"] == drawn(found["labels"] == found["top1"])
    assert "kl" not in dense["scores"]  # Of votes.
    assert written["classified_by"] == results["classified_by"]
    pictures = read_folder(data)
    model = hvit_jax.load(checkpoint, "evit", keep_rate=0.5)
    pixels = [resize_and_crop(pictures.open(place), (16, 24)) for place in range(10)]
    shares = scored[0](hvit_jax.jit_model(model)(normalize(np.stack(pixels))))
    right = np.asarray(shares).argmax(1) == pictures.labels
    assert evit["draws"] == drawn(right)


TOME = [Setting(hvit_jax.make_reducer("tome", r=2))]
LOW = [Setting(hvit_jax.Reducer(), resolution=(8, 16))]


def outputs_of(model, data, how=lambda model: hvit_jax.jit_model(model)):
    """What a model says of the ten pictures of a folder."""
    pictures = read_folder(data, labelled=None)
    size = model.config.image_shape
    pixels = [resize_and_crop(pictures.open(place), size) for place in range(10)]
    return np.asarray(how(model)(normalize(np.stack(pixels)))), np.array(pictures.labels)


@pytest.mark.parametrize("flag", [[], ["--unlabelled"]])
def test_without_labels_the_dense_model_is_the_measure(tmp_path, capsys, flag):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    data = make_pictures(tmp_path / "data")
    if not flag:
        for picture in data.rglob("*.png"):
            picture.rename(data / picture.name)
        for folder in data.glob("c*"):
            folder.rmdir()
    rows, _ = compared(tmp_path, data, "--checkpoint", checkpoint, *flag, settings=[*TOME, *LOW])
    assert "no labels: compared with what the dense model says" in capsys.readouterr().err
    dense, _ = outputs_of(hvit_jax.load(checkpoint), data)
    others = hvit_jax.load(checkpoint, "tome", r=2), hvit_jax.load(checkpoint, resolution=(8, 16))
    for row, model in zip(rows[1:], others, strict=True):
        assert list(row["scores"]) == ["agreement", "kl"]
        mine, _ = outputs_of(model, data)
        same = 100 * (mine.argmax(1) == dense.argmax(1)).mean()
        assert row["scores"]["agreement"]["value"] == pytest.approx(same)
        p, q = (jax.nn.softmax(each.astype(float)) for each in (dense, mine))
        divergence = float((p * np.log(p / q)).sum(1).mean())
        assert row["scores"]["kl"]["value"] == pytest.approx(divergence, rel=1e-3)
    assert rows[0]["scores"]["agreement"]["value"] == 100 and rows[2]["method"] == "lowres"


def test_folders_that_are_no_classes_of_the_model(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    data = make_pictures(tmp_path / "data", classes=3)
    assert main([str(data), "--checkpoint", str(checkpoint)]) == 2
    errors = capsys.readouterr().err
    assert "the data has 3 classes, the checkpoint's head has 7" in errors
    assert errors.endswith("; --unlabelled leaves labels aside\n") and errors.count("\n") == 1


def test_features_of_a_model_without_a_head(tmp_path):
    config = dataclasses.replace(CONFIG, num_classes=0)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    data = make_pictures(tmp_path / "data", classes=3)
    rows, written = compared(tmp_path, data, "--checkpoint", checkpoint,
                             settings=[*TOME, *LOW])  # fmt: skip
    assert [list(row["scores"]) for row in rows] == [["knn", "cosine", "patches"]] * 3
    assert written["labels"]["outputs"] == 3
    dense, tome = hvit_jax.load(checkpoint), hvit_jax.load(checkpoint, "tome", r=2)
    (one, labels), (other, _) = outputs_of(dense, data), outputs_of(tome, data)
    value = {name: each["value"] for name, each in rows[1]["scores"].items()}
    assert value["cosine"] == pytest.approx(100 * cosines(one, other).mean(), abs=1e-4)
    assert value["knn"] == pytest.approx(100 * leave_one_out(other, labels, 20).mean())
    one, other = (outputs_of(each, data, lambda model: hvit_jax.jit_model(model).dense_features)[0]
                  for each in (dense, tome))  # fmt: skip
    assert value["patches"] == pytest.approx(100 * cosines(one, other).mean(), abs=0.02)
    assert 0 < rows[2]["scores"]["patches"]["value"] < 100


def test_neighbours_vote_without_the_picture_itself():
    """Three directions; the picture that is alone in its class is never right."""
    features = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0.95, 0.05]], np.float32)
    labels = np.array([0, 0, 1, 1, 2])
    assert leave_one_out(features, labels, 1).tolist() == [False, False, True, True, False]
    # With all others the weights decide: exp(cosine / 0.07), so the nearest still wins.
    assert leave_one_out(features, labels, 3).tolist() == [False, False, True, True, False]


def test_the_divergence_of_two_outputs():
    logits = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert kl_divergence(logits, other + 3.0) == pytest.approx([expected, 0.0])
