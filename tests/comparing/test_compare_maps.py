"""`hvit compare` on models that make maps: scores, lower resolutions, named commands."""

import json
import shlex

import numpy as np
import pytest
from rich.console import Console

import hvit_jax
from hvit_jax.commands import depth, segment
from hvit_jax.commands.compare import main
from hvit_jax.comparing.opening import open_comparison
from hvit_jax.comparing.report import commands
from hvit_jax.comparing.rows import Trial
from hvit_jax.comparing.settings import Setting
from hvit_jax.config import Decoder
from hvit_jax.dense import predict
from tests.comparing.test_compare import check_page, configured
from tests.comparing.test_compare_inputs import compared
from tests.map_setup import make_checkpoint, make_folder, noise, save

TOME = Setting(hvit_jax.make_reducer("tome", r=3))
LOW = Setting(hvit_jax.Reducer(), resolution=(24, 24))


def measured_by(command, module, output):
    """Results of a command that a comparison named."""
    words = [*shlex.split(command)[2:], "-j", "0", "--output", str(output), "--overwrite"]
    assert module.main(words) == 0
    return json.loads(output.read_text())


def test_segments_beside_the_truth(tmp_path, capsys):
    """mIoU of each row is that of the command that is named for it, a lower resolution's too."""
    folder = make_folder(tmp_path / "data", range(5))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    words_of_data = [folder, "--checkpoint", checkpoint, "-b", "4"]
    rows, written = compared(tmp_path, *words_of_data, settings=[TOME, LOW])
    assert [row["method"] for row in rows] == ["dense", "tome", "lowres"]
    assert written["task"] == "segmentation" and "windows/s" in capsys.readouterr().out
    config = configured(*words_of_data)
    bench = open_comparison(config, Console(stderr=True)).bench
    for row, words in zip(rows, ("", "--method tome --r 3", "--scales 0.75"), strict=True):
        assert list(row["scores"]) == ["miou", "pixels"]
        command, _ = commands(Trial(**row), config, bench)
        assert words in command
        results = measured_by(command, segment, tmp_path / "r.json")
        assert row["scores"]["miou"]["value"] == pytest.approx(results["miou"])
        assert row["gflops"] == results["gflops"]
    assert "--window 24,24 --stride 18,18 --scales 0.75" in command
    config = configured(*words_of_data, "--exif")
    bench = open_comparison(config, Console(stderr=True)).bench
    assert bench.scenes.exif and "--exif" in commands(Trial(**rows[1]), config, bench)[0]


def test_segments_without_truth(tmp_path, capsys):
    """Pixels that the dense model labels so too, in each picture."""
    sizes = [(32, 32), (40, 56)]
    for number, size in enumerate(sizes):
        save(tmp_path / "data" / f"{number}.png", noise(size, number))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    words = [tmp_path / "data", "--checkpoint", checkpoint, "--unlabelled", "--levels", "0.99"]
    words += ["--drawn", "1", "--output", tmp_path / "c.html"]
    rows, _ = compared(tmp_path, *words, settings=[TOME])
    check_page(tmp_path / "c.html", ["tome r=3", "same pixels (%)", "The map over the picture"], 3)
    assert "no truth: compared with what the dense model says" in capsys.readouterr().err
    models = hvit_jax.load(checkpoint), hvit_jax.load(checkpoint, "tome", r=3)
    shares = []
    for number, size in enumerate(sizes):
        one, other = (predict(model, noise(size, number)) for model in models)
        shares.append((one == other).mean())
    assert list(rows[1]["scores"]) == ["pixels"] and min(shares) < 1
    assert rows[1]["scores"]["pixels"]["value"] == pytest.approx(100 * np.mean(shares))


def test_depth_beside_the_truth(tmp_path, capsys):
    decoder = Decoder("depth_linear", 16, taps=(0, 1), depth_range=(0.5, 8.0))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", decoder=decoder)
    for number in range(3):
        save(tmp_path / "data" / "images" / f"{number}.png", noise((32, 40), number))
        metres = np.random.default_rng(number).uniform(1, 5, (32, 40)).astype(np.float32)
        (tmp_path / "data" / "depth").mkdir(exist_ok=True)
        np.save(tmp_path / "data" / "depth" / f"{number}.npy", metres)
    words = [tmp_path / "data", "--checkpoint", checkpoint, "--max-drop", "100"]
    rows, _ = compared(tmp_path, *words, settings=[TOME])
    (command,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("hvit depth")
    ]
    results = measured_by(command, depth, tmp_path / "r.json")
    assert list(rows[1]["scores"]) == ["rmse", "apart"]
    assert rows[1]["scores"]["rmse"]["value"] == pytest.approx(results["rmse"])
    models = hvit_jax.load(checkpoint), hvit_jax.load(checkpoint, "tome", r=3)
    errors = []
    for number in range(3):
        one, other = (predict(model, noise((32, 40), number)) for model in models)
        errors.append((np.abs(other - one) / one).mean())
    assert rows[1]["scores"]["apart"]["value"] == pytest.approx(100 * np.mean(errors), rel=1e-3)


def test_mistakes_are_one_line(tmp_path, capsys):
    folder = make_folder(tmp_path / "data", range(5))
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for words, message in [
        (["--resolution", "16"], "--resolution is for models of classes; give --window"),
        (["--subset"], "--subset is for models of classes"),
        (["--depth-scale", "1"], "--depth-scale is for models of depth"),
        (["--window", "20"], "--window 20 is not a multiple of the patch size 8"),
    ]:
        assert main([str(folder), "--checkpoint", str(checkpoint), *words]) == 2
        errors = capsys.readouterr().err
        assert message in errors and errors.count("\n") == 1
