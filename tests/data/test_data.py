"""Folders of pictures, odd pictures, and batches of them."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from hvit_jax import InputError
from hvit_jax.data.folder import PictureError, open_picture, read_folder
from hvit_jax.data.loader import fits_shared_memory, load_batches


def write_picture(path, value=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 255 - value)).save(path)


@pytest.fixture
def folder(tmp_path):
    for index in range(11):
        write_picture(tmp_path / "ab"[index % 2] / f"{index:02d}.png", index)
    return tmp_path


def test_folder_lists_pictures_in_sorted_order(tmp_path):
    for name in ("dog/b.png", "dog/deep/a.JPG", "cat/z.png"):
        write_picture(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    write_picture(tmp_path / "outside.png")
    source = read_folder(tmp_path)
    assert source.classes == ("cat", "dog", "empty")
    assert source.paths == ("cat/z.png", "dog/b.png", "dog/deep/a.JPG")
    assert source.labels == (0, 1, 1)


@pytest.mark.parametrize("split", ["val", "img_val"])
def test_folder_finds_the_split_and_names_paths_from_data(tmp_path, split):
    write_picture(tmp_path / split / "cat" / "a.png", 7)
    write_picture(tmp_path / "train" / "cat" / "b.png")
    source = read_folder(tmp_path)
    assert source.paths == (f"{split}/cat/a.png",)
    assert source.classes == ("cat",)
    assert source.open(0).getpixel((0, 0)) == (7, 14, 248)


def test_links_are_followed_and_loops_end(tmp_path):
    write_picture(tmp_path / "data" / "cat" / "a.png")
    write_picture(tmp_path / "elsewhere" / "b.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "cat" / "link")
    os.symlink(tmp_path / "data" / "cat", tmp_path / "data" / "cat" / "loop")
    assert read_folder(tmp_path / "data").paths == ("cat/a.png", "cat/link/b.png")


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_folder(tmp_path / "missing")
    with pytest.raises(InputError, match="no class folders"):
        read_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"no pictures .* expected .*CLASS/PICTURE"):
        read_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder"):
        read_folder(tmp_path / "file")


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "png"),
        ("LA", "png"),
        ("P", "png"),
        ("PA", "tif"),
        ("RGBA", "png"),
        ("CMYK", "jpg"),
        ("YCbCr", "jpg"),
        ("I;16", "png"),
    ],
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    pixels = np.arange(12 * 8 * 3, dtype=np.uint8).reshape(12, 8, 3)
    through = {"LA": "L", "PA": "P", "I;16": "I"}.get(mode, "RGB")
    image = Image.fromarray(pixels).convert(through).convert(mode)
    path = tmp_path / f"a.{suffix}"
    image.save(path)
    opened = open_picture(path, path.name)
    assert opened.mode == "RGB" and opened.size == (8, 12)
    with Image.open(path) as stored:
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(stored.convert("RGB")))


def test_palette_with_transparency_keeps_its_colours(tmp_path, recwarn):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    opened = open_picture(tmp_path / "a.png", "a.png")
    assert np.asarray(opened).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert not recwarn.list


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.png", "a").getpixel((0, 0)) == (255, 0, 0)


def test_orientation_in_exif_is_not_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotate by 90 degrees to show.
    image.save(tmp_path / "a.png", exif=exif)
    opened = open_picture(tmp_path / "a.png", "a.png")
    assert opened.size == (8, 4)
    assert opened.getpixel((0, 0)) == (255, 0, 0) and opened.getpixel((7, 0)) == (0, 0, 255)


def damaged(tmp_path):
    write_picture(tmp_path / "whole.png", 3, (64, 64))
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    os.symlink(tmp_path / "nowhere", tmp_path / "broken.png")


@pytest.mark.parametrize("name", ["truncated.png", "empty.png", "text.jpg", "broken.png"])
def test_damaged_pictures_are_named(tmp_path, name):
    damaged(tmp_path)
    with pytest.raises(PictureError, match=f"picture cat/{name}: .+"):
        open_picture(tmp_path / name, f"cat/{name}")


def collect(source, **options):
    with load_batches(source, (8, 8), **options) as batches:
        return list(batches)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_each_picture_comes_once_and_in_order(folder, batch_size):
    source = read_folder(folder)
    batches = collect(source, batch_size=batch_size, workers=0)
    assert [index for batch in batches for index in batch.indices] == list(range(11))
    assert {batch.pixels.shape for batch in batches} == {(batch_size, 8, 8, 3)}
    assert sum(int(batch.valid.sum()) for batch in batches) == 11
    for batch in batches:
        reds = [int(os.path.basename(source.paths[index])[:2]) for index in batch.indices]
        assert batch.pixels[: len(reds), 4, 4, 0].tolist() == reds
        assert not batch.pixels[len(reds) :].any()


@pytest.mark.parametrize("shared_memory", [True, False])
def test_workers_give_the_same_batches(folder, shared_memory):
    (folder / "b" / "05.png").write_bytes(b"damaged")
    source = read_folder(folder)
    expected = collect(source, batch_size=4, workers=0)
    found = collect(source, batch_size=4, workers=2, shared_memory=lambda *_: shared_memory)
    assert [batch.indices for batch in found] == [batch.indices for batch in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert one.problems == other.problems


def test_damaged_picture_is_no_valid_row(folder):
    (folder / "b" / "01.png").write_bytes(b"damaged")
    (batch,) = collect(read_folder(folder), batch_size=16, workers=0)
    assert batch.problems == {6: "picture b/01.png: not a picture that Pillow can read"}
    assert batch.valid.tolist() == [True] * 6 + [False] + [True] * 4 + [False] * 5


def test_batches_may_be_left_early(folder):
    with load_batches(read_folder(folder), (8, 8), batch_size=2, workers=0) as batches:
        assert next(batches).indices == (0, 1)


class Dying:
    """A source whose reading ends the process."""

    paths, labels, classes = ("a",), (0,), ("only",)

    def __len__(self):
        return 1

    def open(self, index):
        os._exit(9)


def test_death_of_a_worker_is_explained():
    with pytest.raises(InputError, match="exit code 9.*fewer --workers"):
        collect(Dying(), batch_size=1, workers=1)


class Curious(Dying):
    """A source that tells whether its process has touched a JAX backend."""

    def open(self, index):
        from jax._src import xla_bridge

        assert os.environ["JAX_PLATFORMS"] == "cpu"
        return Image.new("RGB", (8, 8), (100 * xla_bridge.backends_are_initialized(), 1, 1))


def test_workers_do_not_start_jax():
    (batch,) = collect(Curious(), batch_size=1, workers=1)
    assert batch.pixels[0, 0, 0].tolist() == [0, 1, 1]


def test_sources_can_be_pickled(folder):
    source = read_folder(folder)
    assert pickle.loads(pickle.dumps(source)) == source


def test_impossible_sizes_are_refused(folder):
    with pytest.raises(InputError, match="at least 1 and workers at least 0, got 0 and 1"):
        collect(read_folder(folder), batch_size=0, workers=1)


def test_scarce_shared_memory_is_noticed():
    assert fits_shared_memory(1, (8, 8))
    assert not fits_shared_memory(10**9, (1000, 1000))
