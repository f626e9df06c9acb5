"""Models without a head: k-NN and linear probes, and zero-shot, through the command line."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from PIL import Image

import hvit_jax
from hvit_jax.commands.eval import main
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.evaluation.step import compile_step
from tests.evaluation_setup import evaluate, make_checkpoint, make_pictures, results_of, stop_at
from tests.scale_setup import EVALUATE, run_processes

CONFIG = hvit_jax.ViTConfig(
    (16, 24), patch_size=8, depth=2, width=16, heads=2, mlp_width=32, num_classes=0
)
COLOURS = {"blue": (40, 60, 220), "green": (30, 200, 60), "red": (220, 40, 40)}


def make_colours(folder, count, seed):
    """`count` pictures of each colour, with noise."""
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.clip(colour + random.normal(0, 40, (20, 30, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "headless", CONFIG)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What is evaluated, and beside it `train/`."""
    folder = tmp_path_factory.mktemp("colours")
    make_colours(folder / "train", 5, seed=0)
    return make_colours(folder / "val", 3, seed=1).parent


def api_features(checkpoint, folder):
    source = read_folder(folder)
    model = hvit_jax.load(checkpoint)
    shape = model.config.image_shape
    pixels = [resize_and_crop(source.open(index), shape) for index in range(len(source))]
    return np.asarray(hvit_jax.jit_model(model)(normalize(np.stack(pixels)))), source


def test_nearest_neighbours(checkpoint, data, tmp_path, capsys):
    words = ("--probe", "knn", "--train-data", data, "--probe-k", "4", "-b", "4")
    results, found = results_of(data, checkpoint, tmp_path, *words)
    training, source = api_features(checkpoint, data / "train")
    queries, asked = api_features(checkpoint, data / "val")
    training, queries = (
        each / np.linalg.norm(each, axis=1, keepdims=True) for each in (training, queries)
    )
    cosines = queries @ training.T
    nearest = np.argsort(-cosines, axis=1)[:, :4]
    wanted = np.zeros((9, 3))
    for row, places in enumerate(nearest):
        for place in places:
            wanted[row, source.labels[place]] += np.exp(cosines[row, place] / 0.07)
    wanted /= wanted.sum(1, keepdims=True)
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-4)
    assert found["classes"].tolist() == ["blue", "green", "red"]
    assert found["labels"].tolist() == list(asked.labels)
    assert results["top1"] == 100 * np.mean(wanted.argmax(1) == asked.labels)
    assert results["loss"] is None and results["labels"]["by"] == "names"
    assert results["classified_by"] == "the 4 nearest of 15 training pictures"
    probe = {"k": 4, "temperature": 0.07, "images": 15, "skipped": []}
    assert results["probe"] == probe and results["config"]["classifying"]["probe_k"] == 4
    assert "classified by the 4 nearest of 15 training pictures" in capsys.readouterr().out
    verify = ("-j", "0", "--verify", str(tmp_path / "results.json"))
    assert main(verify) == 0
    assert "verified: top-1 within 0.00 points on 9 images" in capsys.readouterr().out


def test_linear_probe_of_a_model_with_a_head(data, tmp_path, capsys):
    """Its own head is left out; half of the training pictures are bright, and so are the others."""
    config = hvit_jax.ViTConfig(
        (16, 24), patch_size=8, depth=2, width=16, heads=2, mlp_width=32, num_classes=7
    )
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    words = (
        "--probe",
        "linear",
        "--train-data",
        data / "train",
        "--method",
        "evit",
        "--keep-rate",
        "0.7",
    )
    results, found = results_of(data, checkpoint, tmp_path, *words)
    assert results["top1"] == 100 and found["logits"].shape == (9, 3)
    assert results["classified_by"] == "a linear probe of 15 training pictures"
    assert results["probe"]["weight_decay"] <= 0.1 and results["probe"]["steps"] > 1
    assert results["probe"]["training_loss"] < 0.3 and results["loss"] < 0.5
    assert "logistic regression: weight decay" in capsys.readouterr().err


def test_zero_shot(data, tmp_path):
    """Texts are in another order than folders; the file may have more classes."""
    clip = dataclasses.replace(CONFIG, projection=8, pre_norm=True, activation="quick_gelu")
    checkpoint = make_checkpoint(tmp_path / "clip", clip)
    texts = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    names = np.array(["red", "yellow", "blue", "green"])
    np.savez(tmp_path / "t.npz", embeddings=texts, classes=names, logit_scale=20.0)
    results, found = results_of(
        data, checkpoint, tmp_path, "--text-embeddings", tmp_path / "t.npz", "-b", "4"
    )
    images, source = api_features(checkpoint, data / "val")
    images, texts = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts))
    np.testing.assert_allclose(found["logits"], 20 * images @ texts.T, atol=1e-4)
    assert found["labels"].tolist() == [(2, 3, 0)[label] for label in source.labels]
    assert results["labels"]["by"] == "names" and results["loss"] > 0
    assert results["classified_by"] == "t.npz, zero-shot" and results["logit_scale"] == 20


@pytest.fixture
def complaint(checkpoint, data, capsys):
    """Run a command that must fail, and give its one line."""

    def run(*words, data=data):
        assert evaluate(data, checkpoint, *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("hvit eval: ")
        return lines[-1]

    return run


def test_wrong_options(complaint, data, tmp_path):
    knn = ("--probe", "knn", "--train-data", data)
    for words, part in (
        ((), "no classification head; classify its features by --probe knn --train-data DATA, by"),
        (("--probe", "knn"), "--probe knn|linear and --train-data DATA go together"),
        (("--train-data", data), "--probe knn|linear and --train-data DATA go together"),
        (("--probe", "svm", "--train-data", data), "--probe must be one of knn, linear: 'svm'"),
        ((*knn, "--text-embeddings", "t.npz"), "--probe and --text-embeddings contradict"),
        ((*knn, "--probe-k", "16"), "--probe-k 16 is more than the 15 training pictures; give"),
        ((*knn, "--probe-k", "0"), "--probe-k must be at least 1, got 0"),
        ((*knn, "--probe-weight-decay", "1"), "--probe-weight-decay is for --probe linear"),
        (("--probe-k", "3"), "--probe-k is for --probe knn"),
        (("--text-embeddings", "missing.npz"), "cannot read missing.npz: No such file"),
        (("--text-embeddings", "t.json"), "--text-embeddings takes a name that ends in .npz"),
    ):
        assert part in complaint(*words), words


def test_training_pictures_that_cannot_be_read(complaint, tmp_path):
    train = make_colours(tmp_path / "train", 1, seed=0)
    for path in train.glob("*/*.png"):
        path.write_bytes(b"")
    words = ("--train-data", train, "--probe", "linear", "--probe-weight-decay", "1")
    line = complaint(*words)
    assert "picture blue/00.png: " in line and "--on-error skip leaves such pictures out" in line
    line = complaint(*words, "--on-error", "skip")
    assert "none of the training pictures could be read" in line


def test_classes_that_do_not_fit(complaint, data, tmp_path):
    few = ("--probe", "knn", "--probe-k", "2", "--train-data", tmp_path / "few")
    make_pictures(tmp_path / "few", count=4, classes=2)
    line = complaint(*few)
    assert "the data has 3 classes, --train-data has 2 (only the data has blue, green, red" in line
    assert "only --train-data has c0, c1)" in line
    file = ("--text-embeddings", tmp_path / "t.npz")
    names = np.array(["red", "yellow", "blue"])
    np.savez(tmp_path / "t.npz", embeddings=np.eye(3, 16), classes=names)
    assert "only the data has green, only t.npz has yellow" in complaint(*file)
    np.savez(tmp_path / "t.npz", embeddings=np.eye(3, 8), classes=names)
    line = complaint(*file)
    assert "t.npz has embeddings of 8 numbers, the model's have 16; make them with the text" in line


class Killed(Exception):
    """Stands for kill -9: nothing is caught."""


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_stopped_and_resumed(checkpoint, data, tmp_path, capsys, probe):
    """While features are computed, and while pictures are scored; one picture cannot be read."""
    train = make_colours(tmp_path / "train", 5, seed=0)
    (train / "red" / "00.png").write_bytes(b"no picture")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    steps = {}

    def compiled(model, size, placement, scoring):
        head = jax.tree.leaves(scoring.head)
        key = size, *(np.asarray(leaf).tobytes() for leaf in head)
        assert not steps or steps.keys() == {key}, "the head is another after a stop"
        return steps.setdefault(key, compile_step(model, size, placement, scoring))

    def run(folder, *more, **seams):
        folder.mkdir(exist_ok=True)
        words = ("--probe", probe, "--train-data", train, "--on-error", "skip", "-b", "4", *more)
        words += ("--probe-k", "3") if probe == "knn" else ("--probe-weight-decay", "0.01")
        files = ("--output", folder / "r.json", "--predictions", folder / "p.npz")
        seams = {"interval": 0.0, "compile": compiled, **seams}
        return evaluate(data, checkpoint, *words, *files, **seams)

    assert run(whole) == 0
    with pytest.raises(Killed):
        run(folder, on_stage=stop_at("learning", Killed(), 2))
    saved = ["training-000000000.npz", "training-000000004.npz"]
    assert set(saved) < set(os.listdir(folder / "r.json.progress"))
    capsys.readouterr()
    assert run(folder, "--resume", on_stage=stop_at("learning", KeyboardInterrupt(), 1)) == 130
    error = capsys.readouterr().err
    assert "resumed: 8 training pictures were seen before" in error
    assert "interrupted: 12 training pictures were seen; --resume continues" in error
    assert run(folder, "--resume", on_stage=stop_at("batch", KeyboardInterrupt(), 1)) == 130
    capsys.readouterr()
    assert run(folder, "--resume") == 0
    error = capsys.readouterr().err
    assert "resumed: 15 training pictures were seen before" in error
    assert "resumed: 4 of 9 pictures were scored before" in error
    one, other = (json.loads((each / "r.json").read_text()) for each in (whole, folder))
    for name in ("top1", "top5", "loss", "images", "probe"):
        assert one[name] == other[name]
    assert one["probe"]["images"] == 14 and "red/00.png" in one["probe"]["skipped"][0]
    one, other = (np.load(each / "p.npz") for each in (whole, folder))
    np.testing.assert_array_equal(one["logits"], other["logits"])
    assert sorted(os.listdir(folder)) == ["p.npz", "r.json"]


def test_another_probe_is_not_resumed(checkpoint, data, tmp_path, capsys):
    words = ("--train-data", data, "--output", tmp_path / "r.json", "--resume")
    stop = stop_at("learning", KeyboardInterrupt(), 1)
    linear = ("--probe", "linear", *words)
    assert evaluate(data, checkpoint, *linear, on_stage=stop) == 130
    assert evaluate(data, checkpoint, "--probe", "knn", "--probe-k", "3", *words) == 2
    assert "was begun with --probe linear, now knn" in capsys.readouterr().err
    assert evaluate(data, checkpoint, *linear, "--probe-weight-decay", "1") == 2
    assert "was begun without --probe-weight-decay, now 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_two_processes_continue_what_one_began(checkpoint, data, tmp_path, probe):
    results, whole = results_of(data, checkpoint, tmp_path, *_words(probe, data), "-b", "4")
    words = (*_words(probe, data), "-b", "4", "--output", tmp_path / "two.json")
    words += ("--predictions", tmp_path / "two.npz")
    stop = stop_at("learning", KeyboardInterrupt(), 2)
    assert evaluate(data, checkpoint, *words, interval=0.0, on_stage=stop) == 130
    words = (data, "--checkpoint", checkpoint, "-j", "0", *words, "--resume")
    done = run_processes(EVALUATE, 2, *words)
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "resumed: 8 training pictures were seen before" in done[0].stderr
    assert json.loads((tmp_path / "two.json").read_text())["top1"] == results["top1"]
    np.testing.assert_allclose(np.load(tmp_path / "two.npz")["logits"], whole["logits"], atol=1e-4)


def _words(probe, data):
    options = ("--probe-k", "3") if probe == "knn" else ("--probe-weight-decay", "0.01")
    return "--probe", probe, "--train-data", data, *options
