"""`hvit segment` and `hvit depth`, from folders to results."""

import json
import os

import numpy as np
import pytest
from PIL import Image

import hvit_jax
from hvit_jax.config import Decoder
from hvit_jax.data.picture import ORIENTATION
from hvit_jax.dense import predict, predict_scores
from hvit_jax.dense.metrics import Depth, Segmentation
from hvit_jax.pictures import Windows
from hvit_jax.segmenter import (
    find_segmenter_row,
    segmenter_config,
    segmenter_method,
    segmenter_rows,
)
from tests.evaluation_setup import stop_at
from tests.map_setup import (
    SIZES,
    make_checkpoint,
    make_folder,
    noise,
    results_of,
    save,
    segmented,
    truth_of,
)

TIMES = ("images_per_second", "windows_per_second", "input_wait", "config")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", classes=tuple("abcde"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), (0, 1, 2, 3, 4, 255))


def by_hand(checkpoint, sizes, truths, **options):
    """Scores of `predict`, one picture after the other."""
    model = hvit_jax.load(checkpoint)
    metric = Segmentation(tuple("abcde"))
    maps = [predict(model, noise(size, seed), **options) for seed, size in enumerate(sizes)]
    total = sum(metric.measure(*pair) for pair in zip(maps, truths, strict=True))
    return metric.scores(total, len(sizes)), maps


def assert_scores(results, scores):
    for name in ("miou", "macc", "aacc"):
        assert results[name] == pytest.approx(scores[name], abs=1e-9)
    assert results["classes"] == scores["classes"]


def test_plain_folders(checkpoint, folder, tmp_path, capsys):
    """Counts are exact: batches of four windows of several pictures, and the same of one."""
    maps = tmp_path / "maps"
    results = results_of(folder, checkpoint, tmp_path, "-b", 4, "--save-maps", maps)
    truths = [truth_of(size, seed, (0, 1, 2, 3, 4, 255)) for seed, size in enumerate(SIZES)]
    scores, labels = by_hand(checkpoint, SIZES, truths)
    assert_scores(results, scores)
    assert (results["images"], results["window_count"]) == (5, 1 + 4 + 3 + 6 + 6)
    assert len(np.unique(np.concatenate([each.ravel() for each in labels]))) > 2
    out = capsys.readouterr().out
    assert "mIoU (%)" in out and "windows/s" in out and "IoU (%)" in out
    assert sorted(os.listdir(maps / "images"))[:2] == ["0.overlay.jpg", "0.png"]
    for number, (wanted, size) in enumerate(zip(labels, SIZES, strict=True)):
        image = Image.open(maps / "images" / f"{number}.png")
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), wanted)
        assert Image.open(maps / "images" / f"{number}.overlay.jpg").size == size[::-1]
    assert segmented(folder, checkpoint, "--save-maps", maps) == 2
    assert "holds files already; --overwrite replaces them" in capsys.readouterr().err


def test_batches_and_workers_change_nothing(checkpoint, folder, tmp_path):
    one = results_of(folder, checkpoint, tmp_path, "-b", 3, "-j", 1)
    other = results_of(folder, checkpoint, tmp_path, "-b", 16)
    changing = (*TIMES, "batch_size")
    assert {name: value for name, value in one.items() if name not in changing} == {
        name: value for name, value in other.items() if name not in changing
    }


def test_several_views_and_a_method(checkpoint, folder, tmp_path):
    """Scaled and mirrored, beside the dense model, which has its own scores."""
    words = ("--scales", "0.5,1", "--flip", "--method", "hourglass", "--num-clusters", 4)
    words += ("--cluster-location", 1, "--compare-dense", "--restore", "masks")
    results = results_of(folder, checkpoint, tmp_path, *words)
    truths = [truth_of(size, seed, (0, 1, 2, 3, 4, 255)) for seed, size in enumerate(SIZES)]
    scores, _ = by_hand(checkpoint, SIZES, truths, scales=(0.5, 1.0), flip=True)
    assert_scores(results["dense"], scores)
    assert results["gflops"] < results["dense"]["gflops"] and results["published"] is None
    assert results["method"] == "hourglass" and results["args"]["num_clusters"] == 4
    assert results["miou"] != results["dense"]["miou"]
    assert results["dense"]["window_count"] == results["window_count"]


def test_ade20k(tmp_path, capsys):
    """150 classes, of which a tiny model has fewer: named; then a folder that has as many."""
    root = tmp_path / "ADEChallengeData2016"
    for number, size in enumerate(SIZES[:2]):
        pixels = Image.fromarray(noise(size, number))
        (root / "images" / "validation").mkdir(parents=True, exist_ok=True)
        pixels.save(root / "images" / "validation" / f"{number}.jpg", quality=95)
        truth = truth_of(size, number, (0, 1, 2, 150))
        save(root / "annotations" / "validation" / f"{number}.png", truth)
    few = make_checkpoint(tmp_path / "few")
    assert segmented(tmp_path, few) == 2
    assert "ade20k has 150 classes, the decoder of" in capsys.readouterr().err
    checkpoint = make_checkpoint(tmp_path / "m", 150)
    results = results_of(tmp_path, checkpoint, tmp_path)
    assert (results["dataset"], results["images"]) == ("ade20k", 2)
    truths = [truth_of(size, n, (0, 1, 2, 150)) for n, size in enumerate(SIZES[:2])]
    counts = {value: sum((truth == value).sum() for truth in truths) for value in (1, 2, 150)}
    pixels = {each["name"]: each["pixels"] for each in results["classes"] if each["pixels"]}
    assert pixels == {str(value - 1): count for value, count in counts.items()}
    assert results["classes"][149]["name"] == "149"


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path, kind):
    checkpoint = make_checkpoint(tmp_path / "m", 19)
    values = (0, 7, 8, 33, 34) if kind == "labelIds" else (0, 1, 18, 255)
    name = "bonn/bonn_000000_000019"
    save(tmp_path / "leftImg8bit" / "val" / f"{name}_leftImg8bit.png", noise((40, 56), 0))
    truth = truth_of((40, 56), 0, values)
    save(tmp_path / "gtFine" / "val" / f"{name}_gtFine_{kind}.png", truth)
    results = results_of(tmp_path, checkpoint, tmp_path)
    pixels = [each["pixels"] for each in results["classes"]]
    wanted = (7, 8, 33) if kind == "labelIds" else (0, 1, 18)
    assert [pixels[label] for label in (0, 1, 18)] == [(truth == each).sum() for each in wanted]
    assert sum(pixels) == sum((truth == each).sum() for each in wanted)


def test_pascal_context(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "m", 60)
    root = tmp_path / "VOCdevkit" / "VOC2010"
    for name in ("2008_1", "2008_2"):
        save(root / "JPEGImages" / f"{name}.jpg", noise((32, 40), 0))
        save(root / "SegmentationClassContext" / f"{name}.png", truth_of((32, 40), 0, (0, 59)))
    listed = root / "ImageSets" / "SegmentationContext" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("2008_2\n")
    results = results_of(tmp_path, checkpoint, tmp_path)
    assert (results["dataset"], results["images"]) == ("pascal_context", 1)
    pixels = [each["pixels"] for each in results["classes"]]
    assert pixels[0] + pixels[59] == 32 * 40 and pixels[0] > 0


def test_two_folders_and_zero_that_is_ignored(checkpoint, tmp_path):
    save(tmp_path / "p" / "one.png", noise((32, 32), 0))
    save(tmp_path / "t" / "one.png", truth_of((32, 32), 0, (0, 5, 255)))
    words = ("--truth", tmp_path / "t", "--reduce-zero-label")
    results = results_of(tmp_path / "p", checkpoint, tmp_path, *words)
    pixels = [each["pixels"] for each in results["classes"]]
    assert pixels[:4] == [0] * 4
    assert pixels[4] == (truth_of((32, 32), 0, (0, 5, 255)) == 5).sum()


def test_pictures_without_truth(checkpoint, tmp_path, capsys):
    save(tmp_path / "p" / "one.png", noise((24, 24), 0))
    assert segmented(tmp_path / "p", checkpoint, "--truth", "none") == 2
    assert "add --save-maps DIR" in capsys.readouterr().err
    words = ("--truth", "none", "--save-maps", tmp_path / "maps")
    assert segmented(tmp_path / "p", checkpoint, *words) == 0
    model = hvit_jax.load(checkpoint)
    labels = predict(model, tmp_path / "p" / "one.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "maps" / "one.png")), labels)
    shares = predict_scores(model, Image.open(tmp_path / "p" / "one.png"))
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(shares.argmax(-1), labels)


def test_maps_that_would_be_in_the_way_are_refused(checkpoint, tmp_path, capsys):
    """Among the pictures, as pictures of the next run; and of two pictures in one file."""
    words = ("--truth", "none", "--save-maps")
    save(tmp_path / "p" / "one.png", noise((24, 24), 0))
    assert segmented(tmp_path / "p", checkpoint, *words, tmp_path / "p" / "maps") == 2
    assert f"choose a folder outside {tmp_path / 'p'}" in capsys.readouterr().err
    assert not (tmp_path / "p" / "maps").exists()
    save(tmp_path / "p" / "one.bmp", noise((24, 24), 1))
    assert segmented(tmp_path / "p", checkpoint, *words, tmp_path / "maps") == 2
    assert "one.bmp and one.png in " in capsys.readouterr().err


def test_pictures_are_turned_where_that_is_asked_for(checkpoint, tmp_path, capsys):
    """They lie on their sides, and their truth is upright, as tools for labelling write it."""
    plain = make_folder(tmp_path / "plain", (0, 1, 2), SIZES[:2])
    turned = make_folder(tmp_path / "turned", (0, 1, 2), SIZES[:2])
    for path in sorted((turned / "images").iterdir()):
        picture = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        exif = picture.getexif()
        exif[ORIENTATION] = 6
        picture.save(path, exif=exif)
    expected = results_of(plain, checkpoint, tmp_path)
    assert results_of(turned, checkpoint, tmp_path, "--exif")["classes"] == expected["classes"]
    assert segmented(turned, checkpoint) == 2
    assert "truth labels/" in capsys.readouterr().err


def break_folder(root, what):
    first = root / "labels" / "1.png"
    if what == "size":
        save(first, truth_of((40, 48), 1, (0, 1)))
    elif what == "label":
        save(first, truth_of((40, 56), 1, (0, 5, 17)))
    elif what == "colour":
        save(first, noise((40, 56), 1))
    elif what == "missing":
        first.unlink()
    else:
        (root / "images" / "1.png").write_bytes(b"none")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", "truth labels/1.png is of 40 x 48 pixels, its picture images/1.png of 40 x 56"),
        ("label", "truth labels/1.png has the labels 5, 17; the model's classes are 0 to 4, and"),
        ("colour", "truth labels/1.png is a picture in RGB; truth has one number a pixel"),
        ("missing", "1 of 3 files of truth are missing, such as "),
        ("damaged", "picture images/1.png: not a picture that Pillow can read"),
    ],
)
def test_wrong_truth_is_named(checkpoint, tmp_path, capsys, what, message):
    root = make_folder(tmp_path / "data", (0, 1, 255), SIZES[:3])
    break_folder(root, what)
    assert segmented(root, checkpoint) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    if what != "missing":
        assert "--on-error skip leaves such pictures out" in error
        results = results_of(root, checkpoint, tmp_path, "--on-error", "skip")
        assert results["images"] == 2 and message in results["skipped"][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", 30], "--window 30 is not a multiple of the patch size 8; the nearest"),
        (["--stride", 40], "--stride 40 leaves pixels between windows of 32; give at most 32"),
        (["--restore", "block", "--method", "evit"], "restore 'block' needs reconstruct_location"),
        (["--dataset", "cityscapes"], "holds no cityscapes: it has no folders leftImg8bit and"),
        (["--dataset", "ade20k", "--truth", "x"], "--dataset ade20k says where the truth is"),
        (["--truth", "nowhere"], "--truth nowhere is not a folder"),
        (["--resume"], "--resume needs --output FILE.json"),
        (["--scales", "0"], "--scales must be above 0, got 0"),
    ],
)
def test_options_that_do_not_fit(checkpoint, folder, capsys, words, message):
    assert segmented(folder, checkpoint, *words) == 2
    assert message in capsys.readouterr().err


def test_checkpoints_of_other_tasks(checkpoint, tmp_path, folder, capsys):
    assert segmented(folder, checkpoint, program="depth") == 2
    assert "is for segmentation; use hvit segment" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert segmented(tmp_path / "empty", checkpoint) == 2
    assert "holds neither a data set that is known (ade20k, " in capsys.readouterr().err


def test_interrupted_and_resumed(checkpoint, folder, tmp_path, capsys):
    whole = results_of(folder, checkpoint, tmp_path)
    file = tmp_path / "cut.json"
    words = ("-o", file, "-b", 2)
    stopped = stop_at("picture", KeyboardInterrupt(), 2)
    assert segmented(folder, checkpoint, *words, on_stage=stopped, interval=0.0) == 130
    assert "interrupted: 2 of 5 pictures were mapped; --resume continues" in capsys.readouterr().out
    cut = json.loads(file.read_text())
    assert cut["partial"] is True and cut["images"] == 2
    assert segmented(folder, checkpoint, *words, "--resume", "--flip") == 2
    assert "was begun without flip, now with" in capsys.readouterr().err
    assert segmented(folder, checkpoint, *words, "--resume") == 0
    assert "resumed: 2 of 5 pictures were scored before" in capsys.readouterr().err
    resumed = json.loads(file.read_text())
    for name in ("miou", "macc", "aacc", "classes", "images", "window_count", "partial"):
        assert resumed[name] == whole[name]
    assert sorted(os.listdir(tmp_path)) == ["cut.json", "r.json"]
    assert segmented(folder, checkpoint, *words, "--resume") == 0
    assert "is complete: nothing to do" in capsys.readouterr().err


def test_verified(checkpoint, folder, tmp_path, capsys):
    results_of(folder, checkpoint, tmp_path, "--flip")
    from hvit_jax.commands.segment import main

    assert main(["--verify", str(tmp_path / "r.json"), "-j", "0"]) == 0
    assert "verified: mIoU within 0.00 points on 5 images" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**recorded, "miou": recorded["miou"] + 1}))
    assert main(["--verify", str(tmp_path / "r.json"), "-j", "0"]) == 1
    assert "differs: miou was" in capsys.readouterr().out
    (tmp_path / "r.json").write_text("{}")
    assert main(["--verify", str(tmp_path / "r.json")]) == 2
    assert "holds no results, as hvit segment --output" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["png", "npy"])
def test_depth(tmp_path, form):
    decoder = Decoder("depth_linear", 16, taps=(0, 1), depth_range=(0.5, 8.0))
    checkpoint = make_checkpoint(tmp_path / "m", decoder=decoder, windows=Windows(window=30))
    metric, total = Depth(0.5, 8.0), np.zeros(4)
    model = hvit_jax.load(checkpoint)
    for number, size in enumerate(SIZES[:2]):
        save(tmp_path / "images" / f"{number}.png", noise(size, number))
        steps = 20 * truth_of(size, number, (0, 30, 60, 250)).astype(np.uint16)
        (tmp_path / "depth").mkdir(exist_ok=True)
        metres = (steps / np.float32(256)).astype(np.float32)
        if form == "png":
            Image.fromarray(steps).save(tmp_path / "depth" / f"{number}.png")
        else:
            np.save(tmp_path / "depth" / f"{number}.npy", metres)
        found = predict(model, noise(size, number))
        assert found.shape == size and found.dtype == np.float32
        total += metric.measure(found, metres)
    words = ("--depth-scale", 1 / 256, "--save-maps", tmp_path / "maps")
    results = results_of(tmp_path, checkpoint, tmp_path, *words, program="depth")
    scores = metric.scores(total, 2)
    for name in ("rmse", "abs_rel", "delta1"):
        assert results[name] == pytest.approx(scores[name], rel=1e-5)
    saved = np.asarray(Image.open(tmp_path / "maps" / "images" / "1.png"))
    np.testing.assert_allclose(saved / 256, found, atol=1 / 256)


def test_published_rows_are_found():
    for row in segmenter_rows():
        config, reducer = segmenter_config(row["dataset"]), segmenter_method(row)
        found = find_segmenter_row(config, reducer, row["dataset"])
        assert found is not None and found["published"] == row["published"]
        assert find_segmenter_row(config, reducer, "folders") is None
