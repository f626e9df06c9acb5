"""Benchmarks: where rows of `run_all.py` go, which are published; mistakes are one line."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvit_jax.profiling.results import Measurement

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_all(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("run_all")


def test_the_published_rows_are_those_that_it_measures(run_all):
    content = json.loads((run_all.RESULTS / "cpu.json").read_text())
    rows = [Measurement(**row) for row in content["rows"]]
    assert [row.key for row in rows] == [case.row("float32").key for case in run_all.cpu_cases()]
    assert content["config"]["compute"]["dtype"] == "float32"


def test_it_begins_a_file_of_its_own(run_all, monkeypatch, tmp_path):
    """Files in the repository are of other machines, and a laboratory's have other rows."""
    pytest.importorskip("torch")
    published = {path.name for path in run_all.RESULTS.iterdir()}
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(run_all, "Profiler", lambda config: None)
    assert run_all.main([]) == 0
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("rows-") and written.name not in published
    first = json.loads(written.read_text())
    assert run_all.main([]) == 0
    assert len(json.loads(written.read_text())["rows"]) == len(first["rows"]) == 12


def test_a_mistake_in_a_benchmarks_arguments_is_one_line():
    command = [sys.executable, "benchmarks/operations.py", "vit_b16", "1", "float64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    error = "operations.py: dtype 'float64' needs JAX_ENABLE_X64=1 in the environment\n"
    assert (done.returncode, done.stderr) == (2, error)
