"""Compiled programs on disk: who keeps them, where, and what a kill leaves."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hvit_jax import InputError
from hvit_jax.commands.main import records
from hvit_jax.fields import default_of
from hvit_jax.system.programs import WholeEntries, use_compilation_cache

FOLDER, ENABLED = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
ROOT = Path(__file__).parents[2]
KILLED = """
import resource, signal, sys
from hvit_jax.system.programs import WholeEntries
cache = WholeEntries(sys.argv[1], max_size=-1)
cache.put("whole", b"1" * 100)
# The system kills who writes beyond the first 1,000 bytes.
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
cache.put("cut", b"1" * 5000)
"""


def run(*words, **environment):
    own = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**own, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_every_command_that_compiles_keeps_programs():
    with_cache = {
        name: default_of(record.__dataclass_fields__["cache"])
        for name, (_, record) in records().items()
        if "cache" in record.__dataclass_fields__
    }
    others = {"models", "convert", "export"}
    assert with_cache == dict.fromkeys(records().keys() - others, True)


def test_an_evaluation_uses_the_programs_of_an_earlier_one(tmp_path):
    words = ("eval.py", "-j", "0")
    # A fast machine compiles the demo in less time than is kept otherwise.
    own = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    first = run(*words, **own)
    kept = {path: path.stat().st_mtime for path in tmp_path.glob("hvit_jax/xla/*-cache")}
    assert kept, first.stderr
    again = run(*words, **own, JAX_LOG_COMPILES="1")
    assert "Persistent compilation cache hit" in again.stderr
    assert first.stdout.splitlines()[:2] == again.stdout.splitlines()[:2]
    assert {path: path.stat().st_mtime for path in tmp_path.glob("hvit_jax/xla/*-cache")} == kept


def test_no_cache_wins_over_the_environment(tmp_path):
    words = ("profile.py", "--checkpoint", "hvit_jax/demo/checkpoint", "--seconds", "0.01")
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "kept")}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = run(*words, "--no-latency", "--no-cache", **kept)
    assert done.returncode == 0 and "compiled programs are not kept" in done.stderr
    assert not (tmp_path / "kept").exists()


def test_a_kill_while_an_entry_is_written_leaves_the_whole_ones(tmp_path):
    assert run("-c", KILLED, tmp_path).returncode < 0
    assert [path.name for path in tmp_path.glob("*-cache")] == ["whole-cache"]
    cache = WholeEntries(str(tmp_path), max_size=-1)
    assert (cache.get("whole"), cache.get("cut")) == (b"1" * 100, None)
    cache.put("cut", b"2")
    cache.put("whole", b"2")
    assert (cache.get("whole"), cache.get("cut")) == (b"1" * 100, b"2")


@pytest.fixture
def folder_of_jax():
    before = {name: jax.config.values[name] for name in (FOLDER, ENABLED)}
    jax.config.update(ENABLED, True)  # Another test may have run a command with --no-cache.
    yield lambda folder: jax.config.update(FOLDER, str(folder))
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_users_folder_is_used(tmp_path, folder_of_jax):
    folder_of_jax(tmp_path / "kept")  # As JAX_COMPILATION_CACHE_DIR does.
    assert use_compilation_cache() == str(tmp_path / "kept")
    assert (tmp_path / "kept").is_dir()
    (tmp_path / "file").touch()
    folder_of_jax(tmp_path / "file" / "kept")
    with pytest.raises(InputError, match="cannot keep compiled programs in .* or use --no-cache"):
        use_compilation_cache()


def test_a_bucket_is_left_to_jax(tmp_path, folder_of_jax, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jax.config.update(FOLDER, "gs://bucket/programs")
    assert use_compilation_cache() == jax.config.values[FOLDER] == "gs://bucket/programs"
    assert not list(tmp_path.iterdir())
