"""An evaluation that was stopped or killed goes on, and ends as one that was not."""

import errno
import fcntl
import gc
import io
import json
import os
import shutil
import zlib

import jax
import numpy as np
import pytest

from hvit_jax.errors import InputError
from hvit_jax.evaluation import kept, run
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally
from tests.evaluation_setup import evaluate, make_checkpoint, make_pictures
from tests.scale_setup import EVALUATE, run_processes

TIMES = ("images_per_second", "input_wait", "compile_seconds")
# 13 pictures of which two cannot be read, in batches of 3.
WORDS = ("--method", "ats", "--max-tokens", "4", "--on-error", "skip", "-b", "3")


class Killed(Exception):
    """Stands for kill -9: nothing is caught, nothing is saved."""


def free_locks():
    """Do what the system does where a process is killed."""
    for each in gc.get_objects():
        if type(each) is kept.Kept:
            each.release()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    damaged = ("c1/001.png", "c6/006.png")
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=13, damaged=damaged)


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
                    if isinstance(error, Killed):
                        free_locks()
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
        assert err.splitlines()[-1] == ("hvit eval: out of memory at batch 3; try --batch-size 1")
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

    monkeypatch.setattr("hvit_jax.system.files.os.fsync", full_for_a_while)
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


BUSY = "hvit eval: another evaluation writes {}; wait for it or choose another --output"


@pytest.mark.parametrize("more", [(), ("--resume",), ("--overwrite",)])
def test_a_second_evaluation_is_refused_while_one_runs(
    checkpoint, pictures, killed, whole, capsys, more
):
    capsys.readouterr()
    with open(killed / "r.json.progress" / "settings.json", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert evaluate(pictures, checkpoint, *WORDS, *files(killed, *more)) == 2
        assert capsys.readouterr().err.splitlines() == [BUSY.format(killed / "r.json")]
    assert evaluate(pictures, checkpoint, *WORDS, *files(killed, "--resume")) == 0
    assert "going on: 6 of 13" in capsys.readouterr().err
    assert_same(killed, whole)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_running_evaluation_holds_the_lock(
    checkpoint, pictures, whole, tmp_path, capsys, monkeypatch, resumed, stops
):
    """Another one is refused before it has kept anything, whatever it is told to do."""
    if resumed:
        stops(2, Killed())
        with pytest.raises(Killed):
            evaluate(pictures, checkpoint, *WORDS, *files(tmp_path))
    other, begin = [], run._load

    def load(running):
        monkeypatch.setattr(run, "_load", begin)
        for more in ((), ("--resume",), ("--overwrite",)):
            other.append(evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, *more)))
        return begin(running)

    monkeypatch.setattr(run, "_load", load)
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path, "--resume")) == 0
    assert other == [2, 2, 2]
    assert capsys.readouterr().err.count(BUSY.format(tmp_path / "r.json")) == 3
    assert_same(tmp_path, whole)


def test_without_locks_the_id_keeps_evaluations_apart(
    checkpoint, pictures, tmp_path, capsys, monkeypatch
):
    """The second one takes the folder: the first one keeps nothing in it, and leaves it alone."""

    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    begin = run._load

    def load(running):
        monkeypatch.setattr(run, "_load", begin)
        other = kept.Kept(tmp_path / "r.json.progress", {})
        other.begin(overwrite=False)
        return begin(running)

    monkeypatch.setattr(run, "_load", load)
    assert evaluate(pictures, checkpoint, *WORDS, *files(tmp_path)) == 0
    assert "r.json.progress is not this evaluation's any more" in capsys.readouterr().err
    assert os.listdir(tmp_path / "r.json.progress") == ["settings.json"]


def refused(begun, capsys, reason):
    assert evaluate(*begun, "--resume") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"r.json.progress is damaged ({reason}); without --resume" in error


def test_files_of_another_evaluation_are_refused(
    begun, checkpoint, pictures, tmp_path, stops, capsys
):
    """The same pictures, checkpoint and options, and yet another run."""
    (tmp_path / "other").mkdir()
    stops(2, Killed())
    with pytest.raises(Killed):
        evaluate(pictures, checkpoint, *WORDS, *files(tmp_path / "other"))
    name = "r.json.progress/000000003.npz"
    shutil.copy(tmp_path / "other" / name, tmp_path / name)
    refused(begun, capsys, "000000003.npz is of another evaluation")
    shutil.copy(tmp_path / "r.json.progress" / "000000000.npz", tmp_path / name)
    refused(begun, capsys, "000000003.npz is of another evaluation")


def rewrite(path, change):
    """Change arrays of a file, whose checksum fits afterwards."""
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    content = buffer.getvalue()
    path.write_bytes(content + zlib.crc32(content).to_bytes(4, "big"))


@pytest.mark.parametrize("name", ["logits", "labels"])
def test_missing_and_short_arrays_are_refused(begun, tmp_path, capsys, name):
    path = tmp_path / "r.json.progress" / "000000003.npz"
    rewrite(path, lambda arrays: arrays.update({name: arrays[name][:1]}))
    refused(begun, capsys, f"000000003.npz has 1 {name} for 3 pictures")
    rewrite(path, lambda arrays: arrays.pop(name))
    refused(begun, capsys, f"000000003.npz has no {name} for 3 pictures")


def test_logits_that_nobody_wants_are_refused(begun, tmp_path, capsys):
    path = tmp_path / "r.json.progress" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "predictions": None}))
    begun = begun[: begun.index("--predictions")]
    refused(begun, capsys, "000000000.npz has 2 logits for 2 pictures")


@pytest.mark.parametrize("name", ["000000000.npz", "000000003.npz", "settings.json"])
def test_no_flipped_bit_goes_unnoticed(begun, tmp_path, name):
    """Every 50th bit: refused with one line, or what is read is the same."""
    folder = tmp_path / "r.json.progress"
    settings = json.loads((folder / "settings.json").read_text())
    del settings["run"]

    def read():
        tally, progress = Tally(keep_logits=True), kept.Kept(folder, settings)
        try:
            progress.restore(tally)
        finally:
            progress.release()
        return repr(tally)

    whole, content, harmless = read(), (folder / name).read_bytes(), 0
    for bit in range(0, 8 * len(content), 50 if name.endswith("npz") else 1):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        try:
            assert read() == whole
            harmless += 1
        except InputError as error:
            assert "is damaged (" in str(error) or "was begun with another" in str(error)
    assert name == "settings.json" or harmless == 0
