"""What a resumed run must share with the first, and how the difference is named."""

import pytest

from hvit_jax.errors import InputError
from hvit_jax.system.files import read_json
from hvit_jax.training.settings import open_output

SETTINGS = {
    "method": "evit",
    "args": {"keep_rate": 0.7, "drop_locations": [1]},
    "model": {"width": 16, "num_classes": 2},
    "config": {"data": "D", "checkpoint": "C", "val": None, "seed": 0, "remat": False},
    "pictures": "24 with names of CRC 01234567",
    "data_sha256": "1",
    "validation_sha256": "2",
    "checkpoint_sha256": "3",
    "checkpoint_source": {},
    "device": "cpu",
    "devices": 1,
    "processes": 1,
    "matmul_precision": "default",
    "versions": {"jax": "1"},
}


@pytest.fixture
def output(tmp_path):
    open_output(tmp_path / "run", SETTINGS, resume=False)
    return tmp_path / "run"


def with_options(**entries):
    return {"config": {**SETTINGS["config"], **entries}}


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        (with_options(seed=1), "with --seed 0, now 1"),
        (with_options(remat=True), "without remat, now with"),
        ({"method": "tome", "args": {"r": 8}}, "with --method evit, now tome"),
        (
            {"args": {"keep_rate": 0.5, "drop_locations": [1]}},
            "with --keep-rate 0.7, now 0.5",
        ),
        # Other sizes follow from another start; by themselves they are named.
        (
            {
                **with_options(checkpoint="E"),
                "checkpoint_sha256": "9",
                "model": {"width": 32, "num_classes": 2},
            },
            "with --checkpoint C, now E",
        ),
        ({"model": {"width": 16, "num_classes": 3}}, "with num_classes 2, now 3"),
        ({"checkpoint_sha256": "9"}, "with another checkpoint in C than now"),
        (
            {"pictures": "23 with names of CRC 89abcdef", "data_sha256": "9"},
            "with pictures 24 with names of CRC 01234567, now 23 with names of CRC 89abcdef",
        ),
        ({**with_options(data="E"), "data_sha256": "9"}, "with DATA D, now E"),
    ],
)
def test_another_run_is_refused_and_its_difference_named_once(output, entries, named):
    with pytest.raises(InputError) as error:
        open_output(output, {**SETTINGS, **entries}, resume=True)
    assert str(error.value) == f"{output} was begun {named}; repeat the first command to resume"
    assert read_json(output / "settings.json") == SETTINGS


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"data_sha256": "9"}, "with other pictures in D than now"),
        ({"validation_sha256": "9"}, "with other validation pictures in DATA than now"),
        ({"devices": 8, "versions": {"jax": "2"}}, "with devices 1, now 8; with jax 1, now 2"),
    ],
)
def test_repaired_pictures_and_other_machines_are_noted_once(output, entries, named, capsys):
    for _ in range(2):
        found = open_output(output, {**SETTINGS, **entries}, resume=True)
    assert capsys.readouterr().err == f"{output} was written {named}\n"
    assert found == (written := read_json(output / "settings.json"))
    (resumed,) = written.pop("resumed")
    assert written == SETTINGS and {name: resumed[name] for name in entries} == entries


def test_moved_data_are_the_same(output, capsys):
    moved = with_options(data="E", checkpoint="F", val="none")
    assert open_output(output, {**SETTINGS, **moved}, resume=True) == SETTINGS
    assert capsys.readouterr().err == "" and read_json(output / "settings.json") == SETTINGS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"method": {"name": "evit"}, "config": {}}', "is damaged"),
    ],
)
def test_damaged_settings(output, content, message):
    (output / "settings.json").write_text(content)
    with pytest.raises(InputError, match=f"settings.json {message}"):
        open_output(output, SETTINGS, resume=True)
