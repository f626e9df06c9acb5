"""Where numbers come from: what differs between two runs is named, and nothing else."""

import pytest

from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.folder import read_folder
from hvit_jax.data.source import open_source
from hvit_jax.system.provenance import changes, describe_runtime
from tests.evaluation_setup import make_pictures

RUN = {
    "device": "cpu",
    "versions": {"jax": "1", "flax": "2"},
    "settings": {"data": "/a", "checkpoint": "/c", "batch_size": 8, "dense": True, "seconds": None},
    "data_sha256": "d",
    "checkpoint_sha256": "c",
    "checkpoint_source": {"file": "x"},
}


def changed(**entries):
    return {
        name: {**value, **entries.get(name, {})}
        if isinstance(value, dict)
        else entries.get(name, value)
        for name, value in RUN.items()
    }


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({}, []),
        ({"settings": {"batch_size": 16}}, ["with --batch-size 8, now 16"]),
        ({"settings": {"seconds": 1}}, ["without --seconds, now 1"]),
        ({"settings": {"batch_size": None}}, ["with --batch-size 8, now without"]),
        ({"settings": {"dense": False}}, ["with dense, now without"]),
        (
            {"device": "H100", "versions": {"flax": "3"}},
            ["with device cpu, now H100", "with flax 2, now 3"],
        ),
        # Where data lie does not matter, what they are does.
        ({"settings": {"data": "/b"}}, []),
        ({"data_sha256": "e"}, ["with other pictures in /a than now"]),
        ({"data_sha256": "e", "settings": {"data": "/b"}}, ["with DATA /a, now /b"]),
        (
            {"checkpoint_sha256": "e", "checkpoint_source": {"file": "y"}},
            ["with another checkpoint in /c than now"],
        ),
    ],
)
def test_only_what_differs_is_named(entries, named):
    assert changes(RUN, changed(**entries)) == named


def test_what_may_change_is_not_named():
    other = changed(device="H100", versions={"jax": "3"}, data_sha256="e", settings={"data": "/b"})
    assert changes(RUN, other, but=("versions", "device")) == ["with DATA /a, now /b"]
    assert changes(RUN, changed(data_sha256="e"), but=("data_sha256",)) == []
    others = changed(settings={"batch_size": 9, "dense": False})
    assert changes(RUN, others, but=("--batch-size",)) == ["with dense, now without"]


def test_options_of_a_record_within_are_named_alone():
    before = changed(settings={"compute": {"dtype": "float32", "unroll": False}})
    now = changed(settings={"compute": {"dtype": "bfloat16", "unroll": False}})
    assert changes(before, now) == ["with --dtype float32, now bfloat16"]


def test_what_an_older_release_did_not_note_is_not_compared():
    old = {name: RUN[name] for name in ("device", "settings")}
    assert changes(old, changed(settings={"batch_size": 9})) == ["with --batch-size 8, now 9"]
    # Without fingerprints, names are all there is.
    assert changes(old, changed(settings={"data": "/b"})) == ["with DATA /a, now /b"]


def test_pictures_are_named_by_content(tmp_path):
    pictures = make_pictures(tmp_path / "pictures", count=3, classes=2)
    first = data_sha256(read_folder(pictures))
    moved = pictures.rename(tmp_path / "moved")
    assert data_sha256(open_source(str(moved))) == first
    one = next(moved.rglob("*.png"))
    one.write_bytes(one.read_bytes() + b"\0")
    assert data_sha256(read_folder(moved)) != first


def test_the_runtime_is_described():
    about = describe_runtime(8)
    assert (about["device"], about["devices"], about["matmul_precision"]) == ("cpu", 8, "highest")
    assert about["versions"].keys() >= {"jax", "jaxlib", "flax", "hvit_jax", "python"}
