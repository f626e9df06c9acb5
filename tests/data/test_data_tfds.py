"""Datasets of TensorFlow Datasets, made and read here without TensorFlow."""

import io
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from hvit_jax import InputError
from hvit_jax.data.loader import load_batches
from hvit_jax.data.picture import PictureError
from hvit_jax.data.source import open_source

tfds = pytest.importorskip("tensorflow_datasets", reason="the extra `tfds` is not installed")
pytest.importorskip("array_record", reason="the extra `tfds` is not installed")

SPLITS = {"train": 3, "validation": 5, "test": 4}


def colour(index):
    return (40 * index, 7, 200 - 40 * index)


def png(index):
    stream = io.BytesIO()
    Image.new("RGB", (12, 9), colour(index)).save(stream, "PNG")
    stream.seek(0)
    return stream


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures whose colour tells their class; the class names are not in alphabetical order."""

    VERSION = tfds.core.Version("1.2.0")
    splits, label = SPLITS, staticmethod(lambda index: index % 3)

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["red", "green", "blue"]),
                "number": tfds.features.Scalar(np.int64),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {name: self._generate_examples(count) for name, count in self.splits.items()}

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"image": png(index), "label": self.label(index), "number": index}


class UnlabelledPictures(TinyPictures):
    splits, label = {"train": 2, "fold": 2}, staticmethod(lambda index: -1)


class NumbersOnly(TinyPictures):
    def _info(self):
        features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _generate_examples(self, count):
        yield from ((index, {"number": index}) for index in range(count))


@pytest.fixture(scope="module", autouse=True)
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (TinyPictures, UnlabelledPictures, NumbersOnly):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        patch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(folder))
        yield folder


def test_split_is_read_without_tensorflow():
    source = open_source("tfds:tiny_pictures:test")
    assert source.classes == ("red", "green", "blue")
    assert source.paths == tuple(f"test/{index:08d}" for index in range(4))
    assert sorted(source.labels) == [0, 0, 1, 2]
    for index, label in enumerate(source.labels):
        image = source.open(index)
        assert image.mode == "RGB" and image.size == (12, 9)
        assert image.getpixel((0, 0))[0] // 40 % 3 == label
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("tiny_pictures", 5),
        ("tiny_pictures:1.2.0", 5),
        ("tiny_pictures:train", 3),
        ("tiny_pictures:1.2.0:train", 3),
        ("tiny_pictures:validation[:2]", 2),
        ("tiny_pictures:train+test", 7),
    ],
)
def test_names_with_version_split_and_part(name, length):
    assert len(open_source(f"tfds:{name}")) == length


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(workers):
    source = open_source("tfds:tiny_pictures")
    with load_batches(source, (8, 8), batch_size=3, workers=workers) as batches:
        found = list(batches)
    assert [index for batch in found for index in batch.indices] == list(range(5))
    pixels = np.concatenate([batch.pixels for batch in found])[:5, 4, 4]
    expected = [source.open(index).getpixel((0, 0)) for index in range(5)]
    np.testing.assert_array_equal(pixels, expected)


def test_source_can_be_pickled():
    source = pickle.loads(pickle.dumps(open_source("tfds:tiny_pictures")))
    assert source.open(0).size == (12, 9)


def test_damaged_record_is_named():
    source = open_source("tfds:tiny_pictures:test")
    object.__setattr__(source, "records", [{"image": b"damaged"}] * 4)
    with pytest.raises(PictureError, match="picture test/00000002: not a picture"):
        source.open(2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "expected tfds:NAME or tfds:NAME:SPLIT"),
        ("tiny_pictures:fold", "cannot open 'fold' .splits: .*validation"),
        ("tiny_pictures:9.9.9", "cannot open .tiny_pictures:9.9.9.*only: 1.2.0"),
        ("nothing_like_this", "has no dataset 'nothing_like_this'"),
        ("mnist", "mnist is not prepared in .*tfds build mnist --file_format=array_record"),
        ("unlabelled_pictures", "name one of its splits: .*fold"),
        ("unlabelled_pictures:fold", "has pictures without labels"),
        ("numbers_only:test", "expected one Image in a record, it has: number"),
    ],
)
def test_mistakes(name, message):
    with pytest.raises(InputError, match=message):
        open_source(f"tfds:{name}")


def test_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "array_record", None)
    with pytest.raises(InputError, match=r"pip install 'hvit-jax\[tfds\]'"):
        open_source("tfds:tiny_pictures")
