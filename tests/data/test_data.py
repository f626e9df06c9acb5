"""Folders of pictures, odd pictures, and batches of them."""

import os
import pickle
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from hvit_jax import InputError
from hvit_jax.data.folder import SPLITS, TRAIN, read_folder
from hvit_jax.data.loader import fits_shared_memory, load_batches, load_rows
from hvit_jax.data.picture import PictureError, open_picture
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.data.source import Subset
from hvit_jax.pictures import Preprocessing

SQUASH = Preprocessing(crop_mode="squash", interpolation="nearest")


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


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("Train", "Validation"), "Validation"),
        (("train", "VAL", "test"), "VAL"),
        (("train", "test"), "test"),
        (("TEST",), "TEST"),
        (("training", "valid"), "valid"),
    ],
)
def test_splits_are_found_whatever_their_case(tmp_path, folders, found):
    for name in folders:
        write_picture(tmp_path / name / "cat" / "a.png")
    source = read_folder(tmp_path)
    assert source.paths == (f"{found}/cat/a.png",) and source.classes == ("cat",)


def test_of_several_splits_the_one_that_is_read_is_named(tmp_path):
    for name in ("train", "val", "test"):
        write_picture(tmp_path / name / "cat" / "a.png")
    assert read_folder(tmp_path).notes == ("reading val/, not test/",)
    assert read_folder(tmp_path, TRAIN).paths == ("train/cat/a.png",)
    assert read_folder(tmp_path, TRAIN).notes == ()


def test_a_split_that_is_not_asked_for_is_no_class(tmp_path):
    write_picture(tmp_path / "Train" / "cat" / "a.png")
    with pytest.raises(InputError, match=r"holds Train/, none of .* val/ .*such as .*/Train"):
        read_folder(tmp_path)
    write_picture(tmp_path / "test" / "a.png")
    with pytest.raises(InputError, match=r"test has no class folders.*; give a table$"):
        read_folder(tmp_path, hint="give a table")
    with pytest.raises(InputError, match=r"test has no class folders.*\.j2k$"):
        read_folder(tmp_path)


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("bus", "car", "train"):
        write_picture(tmp_path / name / "a.png")
    for splits in (SPLITS, TRAIN):
        assert read_folder(tmp_path, splits).classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (("0", "1", "10", "11", *"23456789"), tuple(map(str, range(12)))),
        (("1", "10", *"23456789"), tuple(map(str, range(1, 11)))),
        (("00", "01", "02"), ("00", "01", "02")),
        (("0", "1", "002"), ("0", "1", "002")),
        (("0", "10", "2"), ("0", "10", "2")),
        (("0", "1", "x"), ("0", "1", "x")),
        (("b", "C", "a"), ("C", "a", "b")),
    ],
)
def test_class_folders_that_are_all_numbers_are_in_their_order(tmp_path, names, ordered):
    for name in names:
        write_picture(tmp_path / name / "a.png")
    source = read_folder(tmp_path)
    assert source.classes == ordered
    labels = dict(zip(source.paths, source.labels, strict=True))
    assert labels == {f"{name}/a.png": place for place, name in enumerate(ordered)}


def test_what_is_no_data_is_left_out_and_said(tmp_path):
    write_picture(tmp_path / "cat" / "a.png")
    for name in (
        *(".ipynb_checkpoints/b.png", ".git/b.png", "__MACOSX/cat/b.png", "beside.png"),
        *("cat/.ipynb_checkpoints/b.png", "cat/._a.png", "cat/deep/__MACOSX/b.png"),
    ):
        write_picture(tmp_path / name)
    for name in ("cat/Thumbs.db", "cat/desktop.ini", "cat/a.heic", "cat/b.HEIC", "cat/README"):
        (tmp_path / name).write_bytes(b"")
    for name in ("empty", "lost+found", "$RECYCLE.BIN"):
        (tmp_path / name).mkdir()
    source = read_folder(tmp_path)
    assert source.paths == ("cat/a.png",) and source.classes == ("cat", "empty")
    assert source.notes == (
        "left out: $RECYCLE.BIN/, .git/, .ipynb_checkpoints/, __MACOSX/, lost+found/, .heic (2), "
        "files without an extension (1), hidden files (3), pictures in no class folder (1)",
        "no pictures in a class: empty",
    )
    assert Subset(source, (0,)).notes == source.notes


def test_what_cannot_be_read_is_counted_where_there_is_nothing_else(tmp_path):
    (tmp_path / "cat").mkdir()
    for name in ("a.heic", "b.heic", "c.cr2"):
        (tmp_path / "cat" / name).write_bytes(b"")
    with pytest.raises(
        InputError, match=r"no pictures .*; there are: .cr2 \(1\), .heic \(2\); expected"
    ):
        read_folder(tmp_path)


def test_pictures_without_classes(tmp_path):
    for name in ("b.png", "deep/a.png", ".hidden/c.png"):
        write_picture(tmp_path / "val" / name)
    source = read_folder(tmp_path, labelled=False)
    assert source.paths == ("val/b.png", "val/deep/a.png")
    assert source.labels == (-1, -1) and source.classes == ()
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none has no pictures; expected files with one of .jpg"):
        read_folder(tmp_path / "none", labelled=False)


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
    ],
)
def test_modes_become_rgb(tmp_path, mode, suffix):
    pixels = np.arange(12 * 8 * 3, dtype=np.uint8).reshape(12, 8, 3)
    through = {"LA": "L", "PA": "P"}.get(mode, "RGB")
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


def turned(path, orientation):
    """Write a picture, 8 x 4, red on the left and blue on the right, with an orientation."""
    image = Image.new("RGB", (8, 4), "red")
    image.paste("blue", (4, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, **({"quality": 100} if path.suffix == ".jpg" else {}))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_orientation_in_exif_is_applied_where_it_is_asked_for(tmp_path, suffix):
    turned(tmp_path / "cat" / f"a.{suffix}", 6)  # Rotate by 90 degrees to show.
    lying = read_folder(tmp_path).open(0)
    assert lying.size == (8, 4)
    assert lying.getpixel((0, 0))[0] > 200 and lying.getpixel((7, 0))[2] > 200
    upright = read_folder(tmp_path, exif=True).open(0)
    assert upright.size == (4, 8)
    assert upright.getpixel((0, 0))[0] > 200 and upright.getpixel((0, 7))[2] > 200


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation_is_turned_as_pillow_does(tmp_path, orientation):
    turned(tmp_path / "a.png", orientation)
    opened = open_picture(tmp_path / "a.png", "a.png", exif=True)
    with Image.open(tmp_path / "a.png") as stored:
        expected = ImageOps.exif_transpose(stored)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(expected))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no header", b"no header", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_damaged_exif_data_does_not_make_a_picture_unreadable(tmp_path, exif):
    for name in ("a.png", "a.webp", "a.jpg"):
        Image.new("RGB", (8, 4), "red").save(tmp_path / name, exif=exif)
        assert open_picture(tmp_path / name, name, exif=True).size == (8, 4)


# Every upper byte occurs once, and the lower one differs from it.
SIXTEEN = (np.arange(256) * 256 + 77).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("I;16", "a.png"),
        ("I;16", "a.tif"),
        ("I;16B", "a.tif"),
        ("I;16", "a.pgm"),
        ("I;16", "a.jp2"),
    ],
)
def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path, mode, name):
    pixels = SIXTEEN.astype(">u2") if mode == "I;16B" else SIXTEEN
    Image.frombuffer(mode, (16, 16), pixels.tobytes(), "raw", mode, 0, 1).save(tmp_path / name)
    opened = np.asarray(open_picture(tmp_path / name, name))
    expected = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    np.testing.assert_array_equal(opened, expected)


def write_grey_tiff(path, bits, photometric, packed):
    """Write 2 x 1 pixels of grey as Pillow does not: 12 bits, or 16 of which 0 is white."""
    size = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 122)]
    tags = [*size, (277, 1), (278, 1), (279, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    path.write_bytes(head + entries + bytes(4) + packed)


def test_grey_tiffs_of_twelve_bits_and_with_white_as_zero(tmp_path):
    write_grey_tiff(tmp_path / "a.tif", 12, 1, bytes([0x12, 0x3F, 0xFF]))
    write_grey_tiff(tmp_path / "b.tif", 16, 0, struct.pack("<2H", 0x1234, 0xFFFF))
    for name, expected in (("a.tif", [0x12, 0xFF]), ("b.tif", [0xFF - 0x12, 0])):
        opened = np.asarray(open_picture(tmp_path / name, name))
        np.testing.assert_array_equal(opened[0], np.repeat([expected], 3, axis=0).T)


@pytest.mark.parametrize(
    ("kind", "words"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")]
)
def test_pixels_of_unknown_range_are_refused_by_name(tmp_path, kind, words):
    image = Image.fromarray(np.full((4, 4), 200, kind))
    image.save(tmp_path / "a.tif")
    message = f"picture a.tif: its pixels are {words}; save it with 8 or 16 bits a channel"
    with pytest.raises(PictureError, match=message):
        open_picture(tmp_path / "a.tif", "a.tif")
    with pytest.raises(InputError, match=words):
        resize_and_crop(image, (4, 4))


@pytest.mark.parametrize("name", ["a.gif", "a.GIF", "a.avif", "a.jfif", "a.jp2", "a.jpe"])
def test_other_formats_of_pillow_are_read(tmp_path, name):
    write_picture(tmp_path / "cat" / name, 80)
    (picture,) = [source.open(0) for source in [read_folder(tmp_path)]]
    np.testing.assert_allclose(picture.getpixel((5, 5)), (80, 160, 175), atol=6)


def corrupt_exif(path):
    """Write a picture whose EXIF data ends early; Pillow warns of that when it is opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    early = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0"
    Image.new("RGB", (8, 8), "red").save(path, "JPEG", exif=early)


def test_warnings_of_pillow_are_not_printed_by_workers(tmp_path, capfd):
    corrupt_exif(tmp_path / "cat" / "a.jpg")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        read_folder(tmp_path, exif=True).open(0)
    (batch,) = collect(read_folder(tmp_path, exif=True), batch_size=1, workers=1)
    assert batch.problems == {} and capfd.readouterr() == ("", "")


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


def test_batches_are_prepared_as_they_are_asked_to_be(folder):
    source = read_folder(folder)
    (batch,) = collect(source, batch_size=11, workers=0, preprocessing=SQUASH)
    expected = [resize_and_crop(source.open(index), (8, 8), SQUASH) for index in range(11)]
    np.testing.assert_array_equal(batch.pixels, expected)


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


def large_row(place):
    return {"pixels": np.full((200, 200, 3), place, np.uint8)}


def test_rows_left_early_hold_no_shared_memory():
    """Otherwise the end of the program would warn of what was never freed."""
    with load_rows(large_row, 3, workers=1) as rows:
        first = next(rows)
    assert type(first["pixels"]) is np.ndarray and (first["pixels"] == 0).all()


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

    paths, labels, classes, notes = ("a",), (0,), ("only",), ()

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
