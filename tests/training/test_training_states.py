"""States on disk: recorded checksums, damage, and what is not damage."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from hvit_jax.errors import InputError
from hvit_jax.training.files import StateFolder
from hvit_jax.training.trainer import TrainState


def state(step):
    weights = {"kernel": jnp.arange(64, dtype=jnp.float32) + step}
    return TrainState(jnp.int32(step), weights, {"mu": jnp.zeros(3)}, None)


@pytest.fixture
def folder(tmp_path):
    """States of steps 3, 6 and 9, of which the two newest are kept."""
    states = StateFolder(tmp_path / "state")
    for step in (3, 6, 9):
        states.save(state(step))
    states.close()
    return tmp_path / "state"


def recorded(folder):
    return json.loads(folder.with_name("state-checksums.json").read_text())


def restore(folder):
    """Give the step restored and what was noted."""
    notes = []
    states = StateFolder(folder)
    try:
        found = states.restore(state(0), note=notes.append)
    finally:
        states.close()
    assert found is not None
    step = int(found[0].step)
    np.testing.assert_array_equal(found[0].parameters["kernel"], state(step).parameters["kernel"])
    return step, notes


def flip_a_bit(folder):
    """Change one bit of the largest file: that of the arrays."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_states_on_disk_have_checksums(folder):
    assert sorted(recorded(folder)) == ["6", "9"]
    assert restore(folder) == (9, [])


def test_those_of_the_last_state_come_with_the_next_or_on_closing(tmp_path):
    states = StateFolder(tmp_path / "state")
    states.save(state(1))
    assert not (tmp_path / "state-checksums.json").exists()
    states.save(state(2))
    assert list(recorded(tmp_path / "state")) == ["1"]
    states.save(state(3))
    states.close()
    assert sorted(recorded(tmp_path / "state")) == ["2", "3"]


def test_a_flipped_bit_is_damage(folder):
    for _ in range(2):
        flip_a_bit(folder / "9")
        step, (note,) = restore(folder)
        assert step == 6 and "the state of step 9 cannot be read, so step 6 it is" in note
        assert "has another content than was written" in note
        assert list(recorded(folder)) == ["6"] and not (folder / "9").exists()
        states = StateFolder(folder)
        states.save(state(9))
        states.close()
        assert sorted(recorded(folder)) == ["6", "9"]
    assert sorted(path.name for path in folder.parent.glob("damaged-*")) == [
        "damaged-9",
        "damaged-9-2",
    ]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_without_a_record_a_state_is_read(folder, content):
    record = folder.with_name("state-checksums.json")
    record.unlink()
    if content is not None:
        record.write_text(content)
    assert restore(folder) == (9, [])


def test_a_kill_between_state_and_record_leaves_no_record_of_another(folder):
    """The step comes again with other content, and is killed before its record."""
    flip_a_bit(folder / "9")
    assert restore(folder)[0] == 6
    states = StateFolder(folder)
    states.save(state(9))
    states.manager.close()
    assert list(recorded(folder)) == ["6"]
    assert restore(folder) == (9, [])


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(code, os.strerror(code)) for code in (errno.EACCES, errno.EIO, errno.ESTALE)),
        ValueError("PERMISSION_DENIED: reading [source locations='x', os_error_code='13']"),
    ],
)
def test_what_the_disk_refuses_is_no_damage(folder, monkeypatch, error):
    def refuse(*arguments, **options):
        raise error

    states = StateFolder(folder)
    monkeypatch.setattr(states.manager, "restore", refuse)
    with pytest.raises(InputError, match=f"^cannot read {folder}/9: [A-Z][a-z/ ]+$"):
        states.restore(state(0))
    states.close()
    assert restore(folder) == (9, [])


def test_neither_is_a_folder_that_went(folder, tmp_path):
    states = StateFolder(folder)
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(InputError, match=f"^cannot read {folder}/9: "):
        states.restore(state(0))


def test_nor_out_of_memory(folder, monkeypatch):
    def full(*arguments, **options):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    states = StateFolder(folder)
    monkeypatch.setattr(states.manager, "restore", full)
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        states.restore(state(0))
    states.close()
    assert restore(folder) == (9, [])
