"""A sweep reads labels and prepares pictures as `hvit eval` with the same options."""

import dataclasses
import functools
import json

import numpy as np

import hvit_jax
from hvit_jax.config import Preprocessing
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.sweeping import sweep
from hvit_jax.sweeping.choice import Candidate
from hvit_jax.sweeping.trials import Trials
from tests.evaluation_setup import CONFIG, make_checkpoint, make_pictures, results_of
from tests.sweeping.test_sweep import configured, twice_as_fast

NAMES = tuple("abcdefg")


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
    output = ["--output", str(tmp_path / "sweep.json"), "--max-drop", "100"]
    bench = functools.partial(Trials, timer=twice_as_fast)
    settings = [Candidate(hvit_jax.make_reducer("tome", r=1))]
    sweep(configured(*inputs, *words, *output), settings=settings, bench=bench)
    printed = capsys.readouterr()
    assert "left out: pictures without a right label (1)" in printed.err
    assert "only outputs of the data's 4 classes compete, of 7" in printed.err
    assert f"--labels {tmp_path / 'labels.json'} --subset" in printed.out
    assert "--crop-pct 0.5" in printed.out
    written = json.loads((tmp_path / "sweep.json").read_text())
    for name in ("preprocessing", "labels", "labels_sha256", "data_sha256"):
        assert written[name] == results[name], name
    (dense,) = [row for row in written["rows"] if row["method"] == "dense"]
    assert dense["top1"] == results["top1"] and 0 < dense["top1"] <= 100
    right = (found["labels"] == found["top1"][:, None]).any(-1)
    assert dense["correct"] == "".join("01"[int(each)] for each in right)
    assert set(np.unique(found["top1"])) <= {0, 1, 2, 3}


def test_a_probe_is_trained_on_the_dense_model(tmp_path, capsys):
    """The dense model has the top-1 of an evaluation; the others are judged by the same probe."""
    config = dataclasses.replace(CONFIG, num_classes=0)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    data = make_pictures(tmp_path / "data")
    probe = ["--probe", "knn", "--train-data", str(data), "--probe-k", "2"]
    results, found = results_of(data, checkpoint, tmp_path, *probe)
    inputs = [str(data), "--checkpoint", str(checkpoint), "-j", "0", "--seconds", "0.001"]
    output = ["--output", str(tmp_path / "sweep.json"), "--max-drop", "100"]
    scored = []

    class Kept(Trials):
        def __post_init__(self):
            super().__post_init__()
            scored.append(self.scoring.head)

    bench = functools.partial(Kept, timer=twice_as_fast)
    settings = [Candidate(hvit_jax.make_reducer("evit", keep_rate=0.5))]
    sweep(configured(*inputs, *probe, *output), settings=settings, bench=bench)
    assert f"--probe knn --train-data {data} --probe-k 2" in capsys.readouterr().out
    written = json.loads((tmp_path / "sweep.json").read_text())
    dense, evit = written["rows"]
    right = "".join("01"[int(each)] for each in found["labels"] == found["top1"])
    assert dense["top1"] == results["top1"] and dense["correct"] == right
    assert written["classified_by"] == results["classified_by"]
    pictures = read_folder(data)
    model = hvit_jax.load(checkpoint, "evit", keep_rate=0.5)
    pixels = [resize_and_crop(pictures.open(place), (16, 24)) for place in range(10)]
    shares = scored[0](hvit_jax.jit_model(model)(normalize(np.stack(pixels))))
    right = np.asarray(shares).argmax(1) == pictures.labels
    assert evit["correct"] == "".join("01"[int(each)] for each in right)
