import gzip
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fashion_mnist.py"
_spec = importlib.util.spec_from_file_location("fashion_mnist", SCRIPT)
fashion_mnist = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fashion_mnist)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def make_source(folder, count=3):
    pixels = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
    labels = np.array([9, 0, 9][:count], np.uint8)
    for prefix in fashion_mnist.SPLITS.values():
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return pixels


def test_pictures_land_in_their_class_folders(tmp_path):
    pixels = make_source(tmp_path)
    assert fashion_mnist.main([str(tmp_path / "out"), "--source", str(tmp_path)]) == 0
    for split in ("train", "val"):
        boots = sorted((tmp_path / "out" / split / "9-ankle-boot").iterdir())
        assert [path.name for path in boots] == ["00000.png", "00002.png"]
        np.testing.assert_array_equal(np.asarray(Image.open(boots[1])), pixels[2])


def test_a_missing_or_damaged_source_is_one_line_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert fashion_mnist.main([str(out), "--source", str(tmp_path)]) == 2
    assert "dataset-fashion-mnist" in capsys.readouterr().err
    make_source(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes())[:-1]))
    assert fashion_mnist.main([str(out), "--source", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a whole IDX file" in error
    assert not out.exists()
