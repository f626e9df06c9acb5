import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_examples_are_tested():
    tested = {"classify.py", "dense_features.py", "fine_tune.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_classify():
    text = output_of("classify.py")
    assert int(re.search(r"agreement on 100 pictures: (\d+) %", text)[1]) >= 85
    assert "first picture: 0-t-shirt" in text


def test_dense_features():
    text = output_of("dense_features.py")
    assert float(re.search(r"two maps: ([\d.-]+)", text)[1]) > 0.8
    assert "1025 dense, 425 tome" in text


@pytest.mark.slow  # Training has its own tests; this is half a minute of the same.
def test_fine_tune():
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", output_of("fine_tune.py"))]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["classify.py", "dense_features.py", "fine_tune.py"])
def test_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 60
