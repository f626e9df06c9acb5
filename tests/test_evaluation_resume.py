"""An evaluation that was stopped or killed goes on, and ends as one that was not."""

import errno
import json
import os
import shutil

import jax
import numpy as np
import pytest

from hvit_jax.errors import InputError
from hvit_jax.evaluation import kept, run
from hvit_jax.evaluation.step import compile_step
from tests.evaluation_setup import evaluate, make_checkpoint, make_pictures
from tests.scale_setup import EVALUATE, run_processes

TIMES = ("images_per_second", "input_wait", "compile_seconds")
# 13 pictures of which two cannot be read, in batches of 3.
WORDS = ("--method", "ats", "--max-tokens", "4", "--on-error", "skip", "-b", "3")


class Killed(Exception):
    """Stands for kill -9: nothing is caught, nothing is saved."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), count=13)
    for name in ("c1/001.png", "c6/006.png"):
        (folder / name).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def steps():
    """Compiled steps: those of the same batch are the same."""
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch, steps):
    """Save after every batch, and compile only once."""

    def compiled(model, size, placement):
        if size not in steps:
            steps[size] = compile_step(model, size, placement)
        return steps[size]

    monkeypatch.setattr(kept, "SECONDS", 0.0)
    monkeypatch.setattr(run, "compile_step", compiled)


@pytest.fixture
def stops(monkeypatch):
    """Let the next evaluation end with an exception, as soon as some batches are scored."""

    def at(batches, error):
        def score(*arguments, on_batch, **options):
            left = batches

            def counted(tally):
                nonlocal left
                on_batch(tally)
                left -= 1
                if left == 0:
                    raise error

            patch.undo()
            run.score(*arguments, on_batch=counted, **options)

        patch = pytest.MonkeyPatch()
        patch.setattr(run, "score", score)

    return at


def files(folder, *more):
    return ("--output", folder / "r.json", "--predictions", folder / "p.npz", *more)


def read(folder):
    results = json.loads((folder / "r.json").read_text())
    return {name: value for name, value in results.items() if name not in TIMES}


def assert_same(folder, whole):
    """The same results and predictions, to the last bit, and nothing else is left."""
    assert read(folder) == read(whole)
    one, other = np.load(folder / "p.npz"), np.load(whole / "p.npz")
    for name in ("paths", "labels", "top1", "logits"):
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].dtype == other[name].dtype
    assert sorted(os.listdir(folder)) == ["p.npz", "r.json"]


@pytest.fixture(scope="module")
def whole(checkpoint, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with jax.default_matmul_precision("highest"):
        assert evaluate(pictures, checkpoint, *WORDS, *files(folder)) == 0
    return folder


@pytest.fixture
def killed(checkpoint, pictures, tmp_path_factory, stops):
    folder = tmp_path_factory.mktemp("killed")
    stops(2, Killed())
    with pytest.raises(Killed):
        evaluate(pictures, checkpoint, *WORDS, *files(folder))
    return folder


@pytest.mark.parametrize("kills", [(1,), (2, 1, 1), (5,)])
def test_killed_and_resumed(checkpoint, pictures, whole, tmp_path, stops, capsys, kills):
    resume = ()
    for batches in kills:
        stops(batches, Killed())
        with pytest.raises(Killed):
            evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, *resume))
        assert os.listdir(tmp_path) == ["r.json.progress"]
        resume = ("--resume",)
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, "--resume")) == 0
    scored = min(13, 3 * sum(kills))
    assert f"going on: {scored} of 13 pictures were scored before" in capsys.readouterr().err
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_stopped_and_resumed(checkpoint, pictures, whole, tmp_path, stops, capsys, error):
    stops(2, error)
    status = evaluate(pictures, checkpoint, *WORDS, *files(tmp_path))
    out, err = capsys.readouterr()
    assert "of 13 pictures were scored; --resume goes on" in out
    if isinstance(error, MemoryError):
        assert err.splitlines()[-1] == ("hvit-eval: out of memory at batch 3; try --batch-size 1")
    assert status == (2 if isinstance(error, MemoryError) else 130)
    assert read(tmp_path)["partial"] is True and read(tmp_path)["images"] == 5
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, "--resume")) == 0
    assert_same(tmp_path, whole)


def test_more_processes_and_a_smaller_batch_go_on(checkpoint, pictures, whole, tmp_path, stops):
    stops(2, Killed())
    with pytest.raises(Killed):
        evaluate(pictures, checkpoint, *WORDS, *files(tmp_path))
    words = (pictures, "--checkpoint", checkpoint, *WORDS[:-1], "4", "-j", "0")
    done = run_processes(EVALUATE, 2, *words, *files(tmp_path, "--resume"))
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "going on: 6 of 13" in done[0].stderr and "going on" not in done[1].stderr
    before, now = read(whole), read(tmp_path)
    assert (now["processes"], now["batch_size"]) == (2, 4)
    for name in ("top1", "top5", "images", "skipped", "report", "partial"):
        assert now[name] == before[name]
    assert now["loss"] == pytest.approx(before["loss"], rel=1e-6)
    one, other = np.load(tmp_path / "p.npz"), np.load(whole / "p.npz")
    for name in ("paths", "labels", "top1"):
        np.testing.assert_array_equal(one[name], other[name])
    assert sorted(os.listdir(tmp_path)) == ["p.npz", "r.json"]


def test_a_damaged_picture_is_skipped_at_the_second_try(checkpoint, pictures, tmp_path, capsys):
    words = ("--output", tmp_path / "r.json", "-b", "1")
    assert evaluate(pictures, checkpoint, *words) == 2
    assert "picture c1/001.png" in capsys.readouterr().err
    assert evaluate(pictures, checkpoint, *words, "--resume", "--on-error", "skip") == 0
    assert read(tmp_path)["images"] == 11 and len(read(tmp_path)["skipped"]) == 2


def test_skipped_pictures_are_not_forgotten(checkpoint, pictures, tmp_path, stops, capsys):
    stops(4, Killed())
    with pytest.raises(Killed):
        evaluate(pictures, checkpoint, *WORDS, *files(tmp_path))
    words = ("--on-error", "stop", *files(tmp_path, "--resume"))
    assert evaluate(pictures, checkpoint, *WORDS, *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "picture c1/001.png: " in line and "--on-error skip goes on without it" in line


@pytest.fixture
def begun(checkpoint, pictures, killed, tmp_path):
    """The arguments of an evaluation that was killed after six pictures, and what it left."""
    shutil.copytree(pictures, tmp_path / "pictures")
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "r.json.progress"
    settings = json.loads((folder / "settings.json").read_text())
    settings["predictions"] = str(tmp_path / "p.npz")
    (folder / "settings.json").write_text(json.dumps(settings))
    return (tmp_path / "pictures", checkpoint, *WORDS, *files(tmp_path))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--method", "dense"], "another method: ats, now dense"),
        (["--max-tokens", "5"], "another args: "),
        (["-r", "32"], "another resolution: [16, 24], now 32"),
        (["--dtype", "bfloat16"], "another dtype: float32, now bfloat16"),
        (["--attention", "xla"], "another attention: auto, now xla"),
        (["--unroll"], "another unroll: False, now True"),
        (["--predictions", "other.npz"], "another predictions: "),
    ],
)
def test_other_settings_are_named(begun, capsys, words, line):
    if words[0] == "--method":
        begun = [word for word in begun if word not in ("--max-tokens", "4")]
    assert evaluate(*begun, "--resume", *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"r.json.progress was begun with {line}" in error
    assert "repeat that command, or leave --resume out" in error


def test_other_pictures_and_another_checkpoint_are_noticed(begun, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other", classes=tuple("abcdefg"))
    assert evaluate(begun[0], other, *begun[2:], "--resume") == 2
    assert "another checkpoint_sha256" in capsys.readouterr().err
    (begun[0] / "c0" / "000.png").write_bytes(b"another")
    assert evaluate(*begun, "--resume") == 2
    assert "another data_sha256" in capsys.readouterr().err


def test_scored_pictures_are_not_lost_by_mistake(begun, whole, tmp_path, capsys):
    assert evaluate(*begun) == 2
    assert "--resume goes on with them, --overwrite begins again" in capsys.readouterr().err
    assert evaluate(*begun, "--overwrite") == 0
    assert "going on" not in capsys.readouterr().err
    shutil.rmtree(begun[0])
    assert read(tmp_path)["top1"] == read(whole)["top1"]
    assert sorted(os.listdir(tmp_path)) == ["p.npz", "r.json"]


@pytest.mark.parametrize("damage", ["cut", "missing", "settings"])
def test_damaged_progress_is_refused(begun, tmp_path, capsys, damage):
    folder = tmp_path / "r.json.progress"
    assert sorted(os.listdir(folder)) == ["000000000.npz", "000000003.npz", "settings.json"]
    first = folder / "000000000.npz"
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-40])
    elif damage == "missing":
        first.unlink()
    else:
        (folder / "settings.json").write_text("{}")
    assert evaluate(*begun, "--resume") == 2
    error = capsys.readouterr().err
    assert "r.json.progress is damaged (" in error and "--overwrite begins again" in error
    assert evaluate(*begun, "--overwrite") == 0


def test_nothing_to_go_on_with(checkpoint, pictures, whole, tmp_path, capsys):
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, "--resume")) == 0
    assert "nothing to go on with: this is the beginning" in capsys.readouterr().err
    assert_same(tmp_path, whole)
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, "--resume")) == 2
    assert "r.json exists already; --overwrite replaces it" in capsys.readouterr().err


def test_resume_needs_output(checkpoint, pictures, capsys):
    assert evaluate(pictures, checkpoint, "--resume") == 2
    assert "--resume needs --output FILE.json" in capsys.readouterr().err


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_for_a_while_stops_nothing(
    checkpoint, pictures, whole, tmp_path, capsys, monkeypatch
):
    calls = []

    def full_for_a_while(descriptor):
        calls.append(descriptor)
        if len(calls) < 3:
            full()

    monkeypatch.setattr("hvit_jax.evaluation.files.os.fsync", full_for_a_while)
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path)[:2]) == 0
    err = capsys.readouterr().err
    assert err.count("No space left on device; a run that is killed loses more") == 2
    assert read(tmp_path) == read(whole)


def test_results_that_could_not_be_written_are_not_scored_again(
    checkpoint, pictures, whole, tmp_path, capsys, monkeypatch
):
    def full_here(*_):
        raise InputError("cannot write r.json: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hvit_jax.evaluation.outcome.save_results", full_here)
        assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path)) == 2
    assert "cannot write" in capsys.readouterr().err
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, "--resume")) == 0
    assert "going on: 13 of 13" in capsys.readouterr().err
    assert_same(tmp_path, whole)
