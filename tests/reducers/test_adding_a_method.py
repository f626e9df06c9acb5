"""docs/adding-a-reducer.md, followed word for word on a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "adding-a-reducer.md").read_text()


def code(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def insert(file, before, text):
    content = file.read_text()
    assert content.count(before) == 1
    file.write_text(content.replace(before, text + before))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project with the guide's method in it."""
    copy = tmp_path_factory.mktemp("guide")
    left_out = shutil.ignore_patterns("__pycache__", "goldens", "*.npz")
    for folder in ("hvit_jax", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=left_out)
    for file in ("eval.py", "pyproject.toml"):
        shutil.copy(ROOT / file, copy)
    method, line, case = code("python")
    (copy / "hvit_jax/reducers/pooling.py").write_text(method)
    registry = copy / "hvit_jax/reducers/__init__.py"
    insert(registry, "from hvit_jax.reducers.smyrf", line)
    insert(registry, "        SMYRF,\n", "        Pooling,\n")
    insert(copy / "tests/reducers/test_contract.py", '    "dense": Case(', case)
    return copy


@pytest.mark.parametrize("command", code("bash"))
def test_commands_of_the_guide(project, command):
    """One runs the contract's tests, the other evaluates the demo."""
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed|pooling", done.stdout)


@pytest.mark.slow  # A minute: they build and trace every method's full sizes.
def test_other_tests_pass_with_the_new_method(project):
    """All that are run for every method; none asks for published numbers or stored ones of it."""
    names = ("test_strengths", "test_flags", "test_gpu_programs")
    files = [next(project.glob(f"tests/*/{name}.py")) for name in (*names, "test_visualize")]
    words = [sys.executable, "-m", "pytest", "-q", "-k", "pooling or all_methods", *files]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
