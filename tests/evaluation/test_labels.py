"""How pictures are labelled and prepared: right values through the command line."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import hvit_jax
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.pictures import Preprocessing
from tests.evaluation_setup import CONFIG, evaluate, make_checkpoint, make_pictures, results_of

NAMES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("labels") / "checkpoint", classes=NAMES)


@pytest.fixture(scope="module")
def best(checkpoint):
    """Give the model's best output for pictures, as arrays of their files."""
    model = hvit_jax.jit_model(hvit_jax.load(checkpoint))

    def best(files):
        pixels = [resize_and_crop(Image.open(file), CONFIG.image_shape) for file in files]
        return np.asarray(model(normalize(np.stack(pixels)))).argmax(-1)

    return best


@pytest.fixture
def flat(tmp_path):
    """Ten pictures in one folder."""
    made = make_pictures(tmp_path / "made")
    (tmp_path / "flat").mkdir()
    for file in sorted(made.glob("*/*.png")):
        shutil.copy(file, tmp_path / "flat")
    return tmp_path / "flat"


def test_folders_of_numbers_are_the_labels(tmp_path, checkpoint, best):
    """Every picture in the folder of the output that the model gives it: all are right."""
    config = hvit_jax.ViTConfig(
        (16, 24), patch_size=8, depth=1, width=16, heads=2, mlp_width=32, num_classes=12
    )
    unnamed = make_checkpoint(tmp_path / "unnamed", config)
    model = hvit_jax.jit_model(hvit_jax.load(unnamed))
    for number in range(12):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
    random = np.random.default_rng(1)
    for index in range(24):
        pixels = random.integers(0, 256, (16, 24, 3), np.uint8)
        output = int(model(normalize(pixels[None])).argmax())
        Image.fromarray(pixels).save(tmp_path / "data" / str(output) / f"{index}.png")
    results, predictions = results_of(tmp_path / "data", unnamed, tmp_path)
    assert results["top1"] == 100 and results["labels"]["by"] == "numbers"
    assert predictions["classes"].tolist() == list(map(str, range(12)))
    assert len(set(predictions["labels"].tolist())) > 2


def test_a_subset_of_the_checkpoints_classes(tmp_path, checkpoint, capsys):
    data = make_pictures(tmp_path / "data", classes=2)
    (data / "c0").rename(data / "dog")
    (data / "c1").rename(data / "bee")
    results, all_compete = results_of(data, checkpoint, tmp_path)
    said = capsys.readouterr().err
    assert "the data has 2 classes, the checkpoint's head 7; all outputs compete" in said
    assert results["labels"] == {
        "by": "names",
        "outputs": 7,
        "notes": [
            "the data has 2 classes, the checkpoint's head 7; all outputs compete (with --subset "
            "only the data's)"
        ],
    }
    assert set(all_compete["labels"].tolist()) == {1, 3}
    assert all_compete["classes"].tolist() == list(NAMES)
    results, found = results_of(data, checkpoint, tmp_path, "--subset")
    assert "only outputs of the data's 2 classes compete, of 7" in capsys.readouterr().err
    logits = all_compete["logits"]
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-6)
    expected = np.where(logits[:, 1] > logits[:, 3], 1, 3)
    np.testing.assert_array_equal(found["top1"], expected)
    assert results["top1"] == 100 * np.mean(expected == found["labels"])
    assert results["labels"]["outputs"] == 2 and results["top5"] == 100


def test_other_names_stop_the_evaluation_unless_it_is_said_how(tmp_path, checkpoint, capsys):
    data = make_pictures(tmp_path / "data")
    assert evaluate(data, checkpoint) == 2
    line = capsys.readouterr().err
    assert "only the data has c0, c1, c2 and 4 more, only the checkpoint has ant, bee" in line
    results, found = results_of(data, checkpoint, tmp_path, "--order")
    assert results["labels"]["by"] == "order"
    assert found["labels"].tolist() == [int(path[1]) for path in found["paths"]]
    classes = tmp_path / "map.csv"
    classes.write_text("".join(f"c{place},{NAMES[6 - place]}\n" for place in range(7)))
    results, found = results_of(data, checkpoint, tmp_path, "--class-map", classes)
    assert results["labels"]["by"] == "the file map.csv"
    assert found["labels"].tolist() == [6 - int(path[1]) for path in found["paths"]]


def test_labels_of_a_flat_folder_from_a_file(tmp_path, checkpoint, flat, best, capsys):
    files = sorted(flat.iterdir())
    right = best(files)
    table = tmp_path / "val.txt"
    table.write_text(
        "".join(f"{file.name} {label}\n" for file, label in zip(files, right, strict=True))
    )
    results, found = results_of(flat, checkpoint, tmp_path, "--labels", table)
    assert results["top1"] == 100 and results["images"] == 10
    assert found["labels"].tolist() == right.tolist()
    assert evaluate(flat, checkpoint, "--verify", tmp_path / "results.json") == 0
    table.write_text(table.read_text().replace(f"{files[0].name} {right[0]}", f"{files[0].name} 3"))
    capsys.readouterr()
    words = ("--labels", table, "--output", tmp_path / "results.json", "--resume")
    files = ("--predictions", tmp_path / "predictions.npz")
    assert evaluate(flat, checkpoint, *words, *files) == 2
    assert "was begun with other labels of DATA than now" in capsys.readouterr().err
    assert evaluate(flat, checkpoint, "--verify", tmp_path / "results.json") == 1
    assert "labels_sha256 was" in capsys.readouterr().out
    assert evaluate(flat, checkpoint) == 2
    error = capsys.readouterr().err
    assert (
        "no class folders" in error
        and "; for pictures without class folders, give --labels" in error
    )


def test_several_right_labels(tmp_path, checkpoint, flat, best, capsys):
    """As ReaL's: a picture is right if any label is; one without is not scored."""
    files = sorted(flat.iterdir())
    output = best(files).tolist()
    labels = [[], [output[1]], [(output[2] + 1) % 7, output[2]], [(output[3] + 1) % 7] * 2]
    labels += [[(each + 1) % 7, (each + 2) % 7] for each in output[4:]]
    table = tmp_path / "real.json"
    table.write_text(
        json.dumps({file.name: each for file, each in zip(files, labels, strict=True)})
    )
    words = ("--labels", table, "-b", "4")
    results, found = results_of(flat, checkpoint, tmp_path, *words)
    assert "left out: pictures without a right label (1)" in capsys.readouterr().err
    assert results["images"] == 9 and results["top1"] == pytest.approx(100 * 2 / 9)
    assert found["paths"].tolist() == [file.name for file in files[1:]]
    assert found["labels"][:3].tolist() == [
        [output[1], -1],
        [(output[2] + 1) % 7, output[2]],
        [(output[3] + 1) % 7, -1],
    ]


def test_the_checkpoints_preprocessing_and_what_options_change_of_it(tmp_path):
    own = Preprocessing(0.8, "squash", "timm", "bilinear", (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", preprocessing=own)
    data = make_pictures(tmp_path / "data")
    model = hvit_jax.jit_model(hvit_jax.load(checkpoint))

    def expected(paths, preprocessing):
        shape = CONFIG.image_shape
        images = [resize_and_crop(Image.open(data / path), shape, preprocessing) for path in paths]
        return model(normalize(np.stack(images), preprocessing.mean, preprocessing.std))

    results, found = results_of(data, checkpoint, tmp_path)
    assert results["preprocessing"]["crop_mode"] == "squash"
    logits = expected(found["paths"], own)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-5)
    words = ("--crop-pct", "0.5", "--interpolation", "bicubic")
    results, found = results_of(data, checkpoint, tmp_path, *words)
    changed = Preprocessing(0.5, "squash", "timm", "bicubic", own.mean, own.std)
    assert results["preprocessing"]["crop_pct"] == 0.5
    assert abs(found["logits"] - logits).max() > 1e-2
    logits = expected(found["paths"], changed)
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-5, atol=1e-5)


def test_orientation_is_followed_where_it_is_asked_for(tmp_path, checkpoint):
    data = make_pictures(tmp_path / "data")
    for index, name in enumerate(NAMES):
        (data / f"c{index}").rename(data / name)
    exif = Image.Exif()
    exif[0x0112] = 8
    for file in data.glob("*/*.png"):
        Image.open(file).save(file, exif=exif)
    _, lying = results_of(data, checkpoint, tmp_path)
    _, upright = results_of(data, checkpoint, tmp_path, "--exif")
    for file in data.glob("*/*.png"):
        Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    _, turned = results_of(data, checkpoint, tmp_path)
    np.testing.assert_array_equal(upright["logits"], turned["logits"])
    assert abs(lying["logits"] - upright["logits"]).max() > 1e-3


def test_what_is_left_out_is_said(tmp_path, checkpoint, capsys):
    data = make_pictures(tmp_path / "data")
    for index, name in enumerate(NAMES):
        (data / f"c{index}").rename(data / name)
    shutil.copytree(data / "ant", data / ".ipynb_checkpoints")
    (data / "ant" / "a.heic").touch()
    assert evaluate(data, checkpoint) == 0
    printed, messages = capsys.readouterr()
    assert "left out: .ipynb_checkpoints/, .heic (1)\n" in messages
    assert "10 pictures, 7 classes" in messages
