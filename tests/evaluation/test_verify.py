import json
import shutil

import pytest

from hvit_jax.evaluation.verify import differences
from tests.evaluation_setup import evaluate, main, make_checkpoint, make_pictures


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with data, checkpoint, and the results of an evaluation of them."""
    folder = tmp_path_factory.mktemp("recorded")
    make_checkpoint(folder / "checkpoint")
    make_pictures(folder / "pictures")
    options = ("--method", "evit", "--keep-rate", "0.6", "-b", "4")
    output = ("--output", folder / "results.json")
    assert evaluate(folder / "pictures", folder / "checkpoint", *options, *output) == 0
    return folder


def verify(*words):
    return main(["--verify", *map(str, words), "-j", "0"])


def changed(recorded, tmp_path, **entries):
    """Results in which some entries, or options of the recorded evaluation, are others."""
    content = json.loads((recorded / "results.json").read_text())
    options = {name: entries.pop(name) for name in list(entries) if name in content["config"]}
    content = {**content, "config": {**content["config"], **options}, **entries}
    (tmp_path / "results.json").write_text(json.dumps(content))
    return tmp_path / "results.json"


def test_the_same_again(recorded, tmp_path, capsys):
    again = tmp_path / "again.json"
    assert verify(recorded / "results.json", "--output", again) == 0
    assert "verified: top-1 within 0.00 points on 10 images" in capsys.readouterr().out
    first, second = (json.loads(path.read_text()) for path in (recorded / "results.json", again))
    for name in ("method", "args", "batch_size", "loss", "data_sha256", "checkpoint_sha256"):
        assert first[name] == second[name]
    assert first["args"]["keep_rate"] == 0.6


def test_data_and_checkpoint_may_have_moved(recorded, tmp_path, capsys):
    for name in ("pictures", "checkpoint"):
        shutil.copytree(recorded / name, tmp_path / name)
    gone = changed(recorded, tmp_path, data="/gone", checkpoint="/gone")
    moved = (tmp_path / "pictures", "--checkpoint", tmp_path / "checkpoint")
    assert verify(gone, *moved) == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"top1": 55.0}, "differs: top1 was 55.00 and is "),
        ({"loss": 1.0}, "differs: loss was 1.000000 and is "),
        ({"images": 9}, "differs: images was 9 and is 10"),
        ({"checkpoint_sha256": "0"}, "differs: checkpoint_sha256 was 0 and is "),
        ({"data_sha256": "0"}, "differs: data_sha256 was 0 and is "),
    ],
)
def test_differences_are_named(recorded, tmp_path, capsys, entries, message):
    assert verify(changed(recorded, tmp_path, **entries)) == 1
    text = capsys.readouterr().out
    assert message in text and "verified" not in text


@pytest.mark.parametrize(
    "entries",
    [
        {"resolution": [16, "--output=out.json", "--overwrite"]},
        {"resolution": [True, 24]},
        {"data": 5},
        {"method": 7},
        {"method": None},
        {"checkpoint": ["a"]},
        {"compute": {"dtype": None}},
        {"compute": {"attention": "--unroll"}},
        {"compute": {"unroll": "yes"}},
        {"compute": "--unroll"},
        {"reducer": {"keep": 0.5}, "args": ["x"]},
        {"config": {"on_error": "skip", "surplus": 1}},
        {"batch_size": "4"},
        {"loss": "x"},
        {"loss": float("inf")},
        {"top5": "x"},
        {"top1": 10**400},
        {"top1": float("nan")},
    ],
    ids=str,
)
def test_a_file_cannot_bring_options_or_nonsense(recorded, tmp_path, monkeypatch, capsys, entries):
    monkeypatch.chdir(tmp_path)
    path = changed(recorded, tmp_path, **entries)
    assert verify(path) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "that hvit eval --output does not write" in errors
    assert [each.name for each in tmp_path.iterdir()] == ["results.json"]


def test_data_that_looks_like_an_option_is_a_folder(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert verify(changed(recorded, tmp_path, data="--overwrite")) == 2
    assert capsys.readouterr().err == "hvit eval: --overwrite does not exist\n"


def test_how_it_ran_is_repeated(recorded, tmp_path):
    entries = {"compute": {"attention": "xla", "unroll": True}, "on_error": "skip"}
    again = tmp_path / "again.json"
    assert verify(changed(recorded, tmp_path, **entries), "--output", again, "-b", "5") == 0
    found = json.loads(again.read_text())["config"]
    assert found["compute"]["attention"] == "xla" and found["compute"]["unroll"] is True
    assert found["on_error"] == "skip" and found["batch_size"] == 5


def test_the_file_may_be_replaced_by_what_it_is_compared_with(recorded, tmp_path, capsys):
    path = changed(recorded, tmp_path, top1=55.0)
    assert verify(path, "--output", path, "--overwrite") == 1
    assert "differs: top1 was 55.00 and is " in capsys.readouterr().out
    assert verify(path) == 0


def test_a_loss_that_is_no_number_any_more(recorded):
    before = json.loads((recorded / "results.json").read_text())
    (line,) = differences(before, {**before, "loss": None})
    assert line.startswith("loss was ") and line.endswith(" and is none")


def test_another_machine_is_mentioned(recorded, tmp_path, capsys):
    assert verify(changed(recorded, tmp_path, device="NVIDIA H100")) == 0
    assert "recorded with device NVIDIA H100, now cpu" in capsys.readouterr().out


def test_a_picture_of_another_size_is_noticed(recorded, tmp_path, capsys):
    shutil.copytree(recorded / "pictures", tmp_path / "pictures")
    one, other = sorted((tmp_path / "pictures").rglob("*.png"))[:2]
    one.write_bytes(other.read_bytes() + b"\0")
    assert verify(recorded / "results.json", tmp_path / "pictures") == 1
    assert "differs: data_sha256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"method": "evit", "args": {}}', "holds no results"),
        (None, "cannot read"),
    ],
)
def test_files_that_hold_no_results(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "it.json").write_text(text)
    assert verify(tmp_path / "it.json") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_cannot_be_repeated(recorded, tmp_path, capsys):
    assert verify(changed(recorded, tmp_path, partial=True)) == 2
    assert "did not finish" in capsys.readouterr().err
    assert verify(recorded / "results.json", "--method", "tome") == 2
    assert "leave out --method" in capsys.readouterr().err
    assert verify(changed(recorded, tmp_path, args={"keep_rate": 7})) == 2
    assert "keep_rate" in capsys.readouterr().err
