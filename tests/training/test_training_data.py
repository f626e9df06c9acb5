"""Pictures that training takes: unreadable ones, other preprocessing, TensorFlow Datasets."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from hvit_jax.checkpoint import read_description
from hvit_jax.config import ViTConfig
from hvit_jax.data.folder import read_folder
from hvit_jax.data.picture import ORIENTATION, PictureError
from hvit_jax.pictures import Preprocessing
from hvit_jax.training.data import Augmented, training_batches
from tests.evaluation_setup import make_checkpoint
from tests.training_setup import column, command, make_data, rows, train


@pytest.fixture
def damaged(tmp_path):
    """Of 12 dark and 12 light pictures the last two dark ones cannot be read."""
    data = make_data(tmp_path / "data")
    for name in ("8.png", "9.png"):  # Sorted as words.
        (data / "train" / "dark" / name).write_bytes(b"no picture")
    return data


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_picture_takes_the_place_of_an_unreadable_one(damaged, workers):
    source = read_folder(damaged, ("train",))
    pictures = Augmented(source, (20, 18), skip_unreadable=True)
    notes, options = [], dict(batch_size=24, seed=0, workers=workers)
    batch = next(training_batches(pictures, note=notes.append, **options))
    assert batch.keys() == {"pixels", "label"}
    # Each picture once, and the first light one two times more, with its own label.
    first = np.asarray(source.open(12))
    assert np.bincount(batch["label"]).tolist() == [10, 14]
    assert sum(bool((each == first).all()) for each in batch["pixels"]) == 3
    assert sorted(notes) == [
        f"skipped: picture train/dark/{name}.png: not a picture that Pillow can read"
        for name in (8, 9)
    ]


def test_without_any_readable_picture_there_is_no_end_of_skipping(damaged):
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"no picture")
    pictures = Augmented(read_folder(damaged, ("train",)), (8, 8), skip_unreadable=True)
    with pytest.raises(PictureError, match="not a picture"):
        next(training_batches(pictures, batch_size=2, seed=0))


def test_unreadable_pictures_are_skipped_where_that_is_asked_for(tmp_path, capsys):
    data, output = make_data(tmp_path / "data", validation=3), tmp_path / "run"
    for name in ("train/dark/3.png", "val/light/0.png"):
        (data / name).write_bytes(b"no picture")
    assert train(data, output, "--epochs", "2") == 2
    assert "train/dark/3.png" in capsys.readouterr().err
    assert train(data, output, "--epochs", "2", "--resume", "--on-error", "skip") == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped: picture train/dark/3.png: not a picture") == 1
    assert printed.count(", without 1 unreadable\n") == 2
    assert column(output, "step", "validation") == [3, 6]
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    assert train(data, tmp_path / "other", "--epochs", "1", "--on-error", "skip") == 2
    assert "no validation picture can be read" in capsys.readouterr().err


def test_a_checkpoint_is_trained_on_pictures_as_its_description_prepares_them(tmp_path):
    """Half black, half white pictures: squashed, and turned, they are one column or row of each."""
    data, sizes = tmp_path / "data", ViTConfig(8, 4, 1, 8, 1, 8, num_classes=2)
    for split in ("train", "val"):
        for index, name in enumerate("ab"):
            (data / split / name).mkdir(parents=True)
            pixels = np.zeros((8, 16, 3), np.uint8)
            pixels[:, 8:] = 255
            exif = Image.Exif()
            exif[ORIENTATION] = 6 if index else 1
            Image.fromarray(pixels).save(data / split / name / "0.png", exif=exif)
    squash = Preprocessing(crop_mode="squash", interpolation="bilinear", mean=(0.5, 0.5, 0.5))
    start = make_checkpoint(tmp_path / "start", sizes, ("a", "b"), squash)
    seen = []

    def batches(pictures, **options):
        made = training_batches(pictures, **options)
        for batch in made:
            seen.append(dict(zip(batch["label"].tolist(), batch["pixels"], strict=True)))
            yield batch

    output = tmp_path / "run"
    words = [data, "--output", output, "--checkpoint", start, "--exif", "--epochs", "1", "-b", "2"]
    words += ["--interpolation", "nearest", "--crop-scale", "1", "--no-flip"]
    assert command(words, batches=batches) == 0
    upright, turned = seen[0][0][..., 0], seen[0][1][..., 0]
    assert (upright[:, :4] == 0).all() and (upright[:, 4:] == 255).all()
    assert (turned[:4] == 0).all() and (turned[4:] == 255).all()
    trained = read_description(output / "checkpoint").preprocessing
    assert trained == dataclasses.replace(squash, interpolation="nearest")


def test_tensorflow_datasets(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets", reason="the extra `tfds` is not installed")
    pytest.importorskip("array_record", reason="the extra `tfds` is not installed")
    from tests.data.test_data_tfds import TinyPictures

    TinyPictures(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    output, val = tmp_path / "run", "tfds:tiny_pictures:validation"
    assert train("tfds:tiny_pictures", output, "--epochs", "8", "--val", val) == 0
    assert read_description(output / "checkpoint").classes == ("red", "green", "blue")
    # The split `train` has 3 pictures: 8 epochs are 3 steps of 8.
    assert column(output, "step") == [2, 3] and column(output, "step", "validation") == [1, 2, 3]
    assert train("tfds:tiny_pictures", tmp_path / "other", "--epochs", "3") == 0
    assert rows(tmp_path / "other", "validation") == []
