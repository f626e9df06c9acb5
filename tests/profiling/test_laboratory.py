"""The laboratory's dry run: what a GPU measures in one call, on a tiny model and any device."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest


@pytest.fixture
def laboratory(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("laboratory")


def test_rows_are_written_one_by_one(laboratory, tmp_path, capsys):
    path, programs = tmp_path / "found.json", tmp_path / "programs"
    words = [
        "--small",
        "--seconds",
        "300",
        "--torch",
        "0",
        "--rows",
        "^tiny (dense,|tome)|exact GELU$|one",
    ]
    status = laboratory.main([*words, "--output", str(path), "--programs", str(programs)])
    found = json.loads(path.read_text())
    assert status == 0 and found["product_tflops"] > 0
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == [
        "tiny dense",
        "tiny tome",
        "tiny dense, float8",
        "exact GELU",
        "tiny dense, one image",
    ]
    for row in found["rows"]:
        assert row["finite"] and row["ms"] > 0 and row["images_per_second"] > 0
        assert row.get("latency_ms", 1) > 0 and ("latency_ms" in row) == (row["batch"] == 1)
    assert rows["tiny tome"]["x_dense"] > 0 and "x_dense" not in rows["tiny dense"]
    assert rows["exact GELU"]["off_dense"] == 0
    assert 0 < rows["tiny dense, float8"]["off_dense"] < 0.5
    assert {file.name for file in programs.iterdir()} == {
        "tiny-dense.txt.gz",
        "tiny-tome.txt.gz",
        "tiny-dense-float8.txt.gz",
        "exact-gelu.txt.gz",
    }
    assert capsys.readouterr().out.count("s left") == len(found["rows"])


def test_a_row_without_its_dense_model_is_held_against_nothing_else(laboratory, tmp_path):
    rows = laboratory.choose(next(laboratory.plan(True)), "tiny (tome|evit)")
    assert [row.name for row in rows] == ["tiny dense", "tiny tome", "tiny evit"]
    rows[0] = dataclasses.replace(rows[0], options={"no_such_option": True})
    here = laboratory.Laboratory(300, tmp_path / "found.json", None, small=True)
    here.measure(rows)
    failed, *others = here.results["rows"]
    assert "no_such_option" in failed["error"] and len(others) == 2
    assert all(row["ms"] > 0 and not {"x_dense", "off_dense"} & row.keys() for row in others)


def test_no_row_starts_when_the_time_is_up(laboratory, tmp_path):
    path = tmp_path / "found.json"
    here = laboratory.Laboratory(0, path, None, small=True)
    here.measure(next(laboratory.plan(True))[:1])
    assert [row["error"] for row in here.results["rows"]] == ["not compiled in time"]


def test_every_wanted_row_is_published(laboratory):
    parts = list(laboratory.plan(False))
    rows = [row for part in parts for row in part]
    names = [row.name for row in rows]
    assert names[0] == "vit_l16 dense" and "vit_h14 dense" in names
    published = sum(row.batch == 32 for part in parts[:2] for row in part)
    assert published == 17 + 4 + len(laboratory.SWITCHES)
    assert {row.reducer.name for row in rows if row.batch == 32} == set(laboratory.REDUCERS)
    assert {row.reducer.name for row in rows if row.gradient} == set(laboratory.REDUCERS)
