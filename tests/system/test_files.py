"""Files and folders that appear whole or not at all."""

import os
import time

import pytest

from hvit_jax import InputError
from hvit_jax.system.files import (
    checksums,
    damages,
    new_file,
    new_folder,
    refuse_existing,
    require_space,
)


def test_folder_appears_when_complete(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as temporary:
        (temporary / "x").write_text("1")
        assert not target.exists() and temporary.parent == target.parent
    assert (target / "x").read_text() == "1"
    assert os.listdir(target.parent) == ["b"]


def test_file_appears_when_complete(tmp_path):
    with new_file(tmp_path / "x") as temporary:
        temporary.write_text("1")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("make", [new_file, new_folder])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_stays_after_a_failure(tmp_path, make, error):
    with pytest.raises(error), make(tmp_path / "x"):
        raise error
    assert os.listdir(tmp_path) == []


def test_nothing_stays_of_threads_that_go_on_writing(tmp_path, monkeypatch):
    """So do those of TensorStore, when another of its writes has failed."""
    pauses = iter(range(3))

    def write(_):
        if next(pauses, None) is not None:
            temporary.mkdir(exist_ok=True)
            (temporary / "late").touch()

    monkeypatch.setattr(time, "sleep", write)
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "x") as temporary:
        raise ZeroDivisionError
    assert next(pauses, None) is None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_errors_of_the_system_name_the_destination(tmp_path, make):
    with pytest.raises(InputError, match="cannot write .*x: No space left"):
        with make(tmp_path / "x"):
            raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [new_file, new_folder])
def test_a_name_that_is_taken_meanwhile_is_kept(tmp_path, make):
    with pytest.raises(InputError, match="exists already"):
        with make(tmp_path / "x"):
            (tmp_path / "x").write_text("other")
    assert (tmp_path / "x").read_text() == "other"
    assert os.listdir(tmp_path) == ["x"]


def test_refuse_existing(tmp_path):
    refuse_existing(tmp_path / "free")
    (tmp_path / "file").touch()
    refuse_existing(tmp_path / "file" / "below")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(InputError, match=f"{name} exists already"):
            refuse_existing(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"), new_folder(tmp_path / "x"):
        pass


def test_checksums_by_hand_and_damages(tmp_path):
    (tmp_path / "d").mkdir()
    for name in ("a", "d/b", "d/c"):
        (tmp_path / name).write_bytes(b"123456789")
    recorded = checksums(tmp_path)
    assert recorded == {name: {"bytes": 9, "crc32": 0xCBF43926} for name in ("a", "d/b", "d/c")}
    assert damages(tmp_path, recorded) == []
    (tmp_path / "a").unlink()
    (tmp_path / "d" / "b").write_bytes(b"12345678")
    (tmp_path / "d" / "c").write_bytes(b"123456780")
    (tmp_path / "surplus").touch()
    assert damages(tmp_path, recorded) == [
        "a is missing",
        "d/b has 8 bytes, not 9",
        "d/c has another content than was written",
    ]


def test_space(tmp_path):
    require_space("x", tmp_path, 1)
    with pytest.raises(
        InputError, match="x: no space left on the disk; it needs 1000000000000.0 MB"
    ):
        require_space("x", tmp_path, 10**18)
