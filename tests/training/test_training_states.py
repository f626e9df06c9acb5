"""States on disk: their checksums, damage, and what is not damage."""

import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from hvit_jax.errors import InputError
from hvit_jax.training.states import StateFolder
from hvit_jax.training.trainer import TrainState


def state(step):
    weights = {"kernel": jnp.arange(64, dtype=jnp.float32) + step}
    sums = {"loss": jnp.float32(step), "steps": jnp.ones(())}
    return TrainState(jnp.int32(step), weights, {"mu": jnp.zeros(3)}, None, sums)


@pytest.fixture
def folder(tmp_path):
    """States of steps 3, 6 and 9, of which the two newest are kept."""
    states = StateFolder(tmp_path / "state")
    for step in (3, 6, 9):
        states.save(state(step))
    states.close()
    return tmp_path / "state"


def checksums_of(folder, step):
    return folder / str(step) / "default" / "checksums.json"


def restore(folder):
    """Give the step restored and what was noted."""
    notes = []
    states = StateFolder(folder)
    try:
        found = states.newest(state(0), note=notes.append)
    finally:
        states.close()
    assert found is not None
    step = int(found.step)
    jax.tree.map(np.testing.assert_array_equal, found, state(step))
    return step, notes


def flip_a_bit(folder):
    """Change one bit of the largest file: that of the arrays."""
    path = max((path for path in folder.rglob("*") if path.is_file()), key=os.path.getsize)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_two_newest_states_stay_with_checksums_of_their_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["6", "9"]
    for step in (6, 9):
        place = checksums_of(folder, step).parent
        files = {path for path in place.rglob("*") if path.is_file()}
        recorded = {place / name for name in json.loads(checksums_of(folder, step).read_text())}
        # Orbax marks the folder as complete after that.
        assert files - recorded == {checksums_of(folder, step), place / "commit_success.txt"}
        assert recorded <= files
    assert restore(folder) == (9, [])


def test_a_flipped_bit_is_damage(folder):
    for _ in range(2):
        flip_a_bit(folder / "9")
        step, (note,) = restore(folder)
        assert step == 6 and "step 9 cannot be read, so the run continues from step 6" in note
        assert "has another content than was written" in note
        assert not (folder / "9").exists()
        states = StateFolder(folder)
        states.save(state(9))
        states.close()
    assert restore(folder) == (9, [])
    assert sorted(path.name for path in folder.parent.glob("damaged-*")) == [
        "damaged-9",
        "damaged-9-2",
    ]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"d": 3}', '{"_METADATA": {"bytds": 1}}'])
def test_a_state_without_checksums_is_damaged(folder, content):
    checksums_of(folder, 9).unlink()
    if content is not None:
        checksums_of(folder, 9).write_text(content)
    step, (note,) = restore(folder)
    assert step == 6 and "the state of step 9 cannot be read" in note and "checksums.json" in note


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
        states.newest(state(0))
    states.close()
    assert restore(folder) == (9, [])


def test_neither_is_a_folder_that_went(folder, tmp_path):
    states = StateFolder(folder)
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(InputError, match=f"^cannot read {folder}/9: "):
        states.newest(state(0))


def test_nor_out_of_memory(folder, monkeypatch):
    def full(*arguments, **options):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    states = StateFolder(folder)
    monkeypatch.setattr(states.manager, "restore", full)
    with pytest.raises(JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        states.newest(state(0))
    states.close()
    assert restore(folder) == (9, [])
