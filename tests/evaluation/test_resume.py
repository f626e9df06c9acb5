"""An evaluation that was stopped or killed continues, and ends as one that was not."""

import contextlib
import errno
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from hvit_jax.errors import InputError
from hvit_jax.evaluation.resume import ProgressFolder
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally
from tests.evaluation_setup import evaluate, make_checkpoint, make_pictures, no_room, stop_at
from tests.scale_setup import EVALUATE, run_processes

TIMES = ("images_per_second", "input_wait", "compile_seconds")
# 13 pictures of which two cannot be read, in batches of 3.
WORDS = ("--method", "ats", "--max-tokens", "4", "--on-error", "skip", "-b", "3")
STAGES = ("opened", "begun", "compiled", "batch", "scored", "written")


class Killed(Exception):
    """Stands for kill -9 between two batches: nothing is caught, nothing more is saved."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    damaged = ("c1/001.png", "c6/006.png")
    return make_pictures(tmp_path_factory.mktemp("pictures"), count=13, damaged=damaged)


@pytest.fixture(scope="module")
def score(checkpoint, pictures):
    """Evaluate, saving after every batch; steps for the same batch are compiled once."""
    steps = {}

    def compiled(model, size, placement, scoring):
        if size not in steps:
            steps[size] = compile_step(model, size, placement, scoring)
        return steps[size]

    def score(folder, *more, pictures=pictures, checkpoint=checkpoint, words=WORDS, **seams):
        files = ("--output", folder / "r.json", "--predictions", folder / "p.npz")
        seams = {"compile": compiled, "interval": 0.0, **seams}
        return evaluate(pictures, checkpoint, *words, *files, *more, **seams)

    return score


def kill(score, folder, batches, *more):
    with pytest.raises(Killed):
        score(folder, *more, on_stage=stop_at("batch", Killed(), batches))


def read(folder):
    results = json.loads((folder / "r.json").read_text())
    results.pop("config")
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
def whole(score, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with jax.default_matmul_precision("highest"):
        assert score(folder) == 0
    return folder


@pytest.fixture
def killed(score, tmp_path):
    """A folder in which an evaluation was killed after six pictures."""
    kill(score, tmp_path, 2)
    return tmp_path


@pytest.mark.parametrize("kills", [(1,), (2, 1, 1), (5,)])
def test_killed_and_resumed(score, whole, tmp_path, capsys, kills):
    resume = ()
    for batches in kills:
        kill(score, tmp_path, batches, *resume)
        assert os.listdir(tmp_path) == ["r.json.progress"]
        resume = ("--resume",)
    assert score(tmp_path, "--resume") == 0
    scored = min(13, 3 * sum(kills))
    assert f"resumed: {scored} of 13 pictures were scored before" in capsys.readouterr().err
    assert_same(tmp_path, whole)


def test_killed_at_any_moment(score, whole, tmp_path):
    """What is on the disk at every stage is what kill -9 would leave."""
    folder, moments = tmp_path / "run", tmp_path / "moments"
    folder.mkdir()

    def keep(stage):
        shutil.copytree(folder, moments / f"{len(os.listdir(moments))}-{stage}")

    moments.mkdir()
    assert score(folder, "--resume", on_stage=keep) == 0
    assert {name.split("-")[1] for name in os.listdir(moments)} == set(STAGES)
    for moment in sorted(moments.iterdir()):
        shutil.rmtree(folder)
        shutil.copytree(moment, folder)
        assert score(folder, "--resume") == 0, moment
        assert_same(folder, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_any_moment(score, whole, tmp_path, capsys, stage):
    """The same command, begun with --resume every time."""
    assert score(tmp_path, "--resume", on_stage=stop_at(stage, KeyboardInterrupt())) == 130
    images = {"compiled": 0, "batch": 2, "scored": 11, "written": 11}
    if stage in images:
        assert read(tmp_path)["images"] == images[stage]
        assert read(tmp_path)["partial"] is (stage != "written")
    else:
        assert os.listdir(tmp_path) == []
    assert score(tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)
    assert_complete(score, tmp_path, capsys)


def assert_complete(score, folder, capsys):
    """Once more: it says that all is done, prints the same table, and changes nothing."""
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    capsys.readouterr()
    assert score(folder, "--resume") == 0
    printed = capsys.readouterr()
    assert printed.err.endswith("r.json is complete: nothing to do\n")
    assert "top-1 (%)" in printed.out and "2 unreadable pictures were left out" in printed.out
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()
    } == before


@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_at_any_moment(score, whole, tmp_path, capsys, stage):
    """A signal after the results are written waits until they are printed."""

    def terminate(reached):
        if reached == stage:
            signal.raise_signal(signal.SIGTERM)

    assert score(tmp_path, "--resume", on_stage=terminate) == 143
    printed = capsys.readouterr()
    assert printed.err.endswith("hvit eval: stopped by SIGTERM\n")
    assert ("top-1 (%)" in printed.out) is (stage not in ("opened", "begun"))
    if stage == "written":
        assert "interrupted" not in printed.out and f"written: {tmp_path / 'r.json'}" in printed.out
        assert_same(tmp_path, whole)
    assert score(tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)
    assert_complete(score, tmp_path, capsys)


def test_complete_results_of_other_settings_are_kept(score, tmp_path, capsys):
    assert score(tmp_path) == 0
    whole = (tmp_path / "r.json").read_bytes()
    for words, line in (
        (["--max-tokens", "5"], "with --max-tokens 4, now 5"),
        (["--dtype", "bfloat16"], "with --dtype float32, now bfloat16"),
        (["--on-error", "stop"], "picture c1/001.png: "),
    ):
        assert score(tmp_path, "--resume", *words) == 2
        assert line in capsys.readouterr().err
    assert (tmp_path / "r.json").read_bytes() == whole
    (tmp_path / "r.json").write_text("mine")
    (tmp_path / "p.npz").unlink()
    assert score(tmp_path, "--resume") == 2
    assert "r.json exists already; --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "r.json").read_text() == "mine"


def test_a_failure_before_the_first_batch_takes_nothing_away(score, whole, tmp_path, capsys):
    assert score(tmp_path, on_stage=stop_at("compiled", KeyboardInterrupt())) == 130
    assert score(tmp_path, "--resume", on_stage=stop_at("compiled", MemoryError())) == 2
    assert "out of memory at batch 3" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["p.npz", "r.json", "r.json.progress"]
    assert score(tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_was_scored_is_reported(score, whole, tmp_path, capsys, error):
    status = score(tmp_path, on_stage=stop_at("batch", error, 2))
    out, err = capsys.readouterr()
    assert "of 13 pictures were scored; --resume continues" in out
    if isinstance(error, MemoryError):
        assert err.splitlines()[-1] == ("hvit eval: out of memory at batch 3; try --batch-size 1")
    assert status == (2 if isinstance(error, MemoryError) else 130)
    assert read(tmp_path)["partial"] is True and read(tmp_path)["images"] == 5
    assert score(tmp_path) == 2
    assert "--resume continues with them, --overwrite starts again" in capsys.readouterr().err
    assert score(tmp_path, "--resume") == 0
    assert_same(tmp_path, whole)


def test_more_processes_and_a_smaller_batch_go_on(checkpoint, pictures, killed, whole):
    words = (pictures, "--checkpoint", checkpoint, *WORDS[:-1], "4", "-j", "0", "--resume")
    files = ("--output", killed / "r.json", "--predictions", killed / "p.npz")
    done = run_processes(EVALUATE, 2, *words, *files)
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    assert "resumed: 6 of 13" in done[0].stderr and "resumed" not in done[1].stderr
    before, now = read(whole), read(killed)
    assert (now["processes"], now["batch_size"]) == (2, 4)
    for name in ("top1", "top5", "images", "skipped", "report", "partial"):
        assert now[name] == before[name]
    assert now["loss"] == pytest.approx(before["loss"], rel=1e-6)
    one, other = np.load(killed / "p.npz"), np.load(whole / "p.npz")
    for name in ("paths", "labels", "top1"):
        np.testing.assert_array_equal(one[name], other[name])
    assert sorted(os.listdir(killed)) == ["p.npz", "r.json"]
    again = run_processes(EVALUATE, 2, *words, *files)
    assert [each.returncode for each in again] == [0, 0], [each.stderr for each in again]
    assert "r.json is complete" in again[0].stderr and read(killed) == now
    assert ["top-1 (%)" in each.stdout for each in again] == [True, False]


def test_a_damaged_picture_is_skipped_at_the_second_try(score, tmp_path, capsys):
    words = ("--on-error", "stop", "-b", "1")
    assert score(tmp_path, *words) == 2
    assert "picture c1/001.png" in capsys.readouterr().err
    assert score(tmp_path, "-b", "1", "--resume") == 0
    assert read(tmp_path)["images"] == 11 and len(read(tmp_path)["skipped"]) == 2


def test_skipped_pictures_are_not_forgotten(score, killed, capsys):
    assert score(killed, "--resume", "--on-error", "stop") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "picture c1/001.png: " in line and "--on-error skip leaves it out" in line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--method", "dense"], "with --method ats, now dense"),
        (["--max-tokens", "5"], "with --max-tokens 4, now 5"),
        (["-r", "32"], "with --resolution 16"),
        (["--dtype", "bfloat16"], "with --dtype float32, now bfloat16"),
        (["--attention", "xla"], "with --attention auto, now xla"),
        (["--unroll"], "without unroll, now with;"),
        (["--predictions", "other.npz"], "with --predictions "),
    ],
)
def test_other_settings_are_named(score, killed, capsys, words, line):
    kept = WORDS[4:] if words[0] == "--method" else WORDS
    assert score(killed, "--resume", *words, words=kept) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"r.json.progress was begun {line}" in error
    assert "repeat that command, or leave --resume out" in error


def test_other_pictures_and_another_checkpoint_are_noticed(
    score, killed, checkpoint, pictures, tmp_path_factory, capsys
):
    other = tmp_path_factory.mktemp("other")
    checkpoint = shutil.copytree(checkpoint, other / "checkpoint")
    pictures = shutil.copytree(pictures, other / "pictures")
    moved = {"checkpoint": checkpoint, "pictures": pictures}
    kill(lambda *words, **seams: score(*words, **seams, **moved), killed, 1, "--resume")
    shutil.rmtree(checkpoint)
    make_checkpoint(checkpoint, classes=tuple(f"c{place}" for place in range(7)))
    assert score(killed, "--resume", **moved) == 2
    assert "was begun with --checkpoint " in capsys.readouterr().err
    (pictures / "c0" / "000.png").write_bytes(b"another")
    assert score(killed, "--resume", pictures=pictures) == 2
    assert "was begun with DATA " in capsys.readouterr().err


def test_scored_pictures_are_not_lost_by_mistake(score, killed, whole, capsys):
    assert score(killed) == 2
    assert "--resume continues with them, --overwrite starts again" in capsys.readouterr().err
    assert score(killed, "--overwrite") == 0
    assert "resumed" not in capsys.readouterr().err
    assert_same(killed, whole)


@pytest.mark.parametrize("damage", ["cut", "missing", "settings"])
def test_damaged_progress_is_refused(score, killed, capsys, damage):
    folder = killed / "r.json.progress"
    pictures = ["000000000.npz", "000000003.npz"]
    assert sorted(os.listdir(folder)) == [*pictures, "lock", "settings.json"]
    first = folder / pictures[0]
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-40])
    elif damage == "missing":
        first.unlink()
    else:
        (folder / "settings.json").write_text("{}")
    assert score(killed, "--resume") == 2
    error = capsys.readouterr().err
    assert "r.json.progress is damaged (" in error and "--overwrite starts again" in error
    assert score(killed, "--overwrite") == 0


def test_nothing_to_go_on_with(score, whole, tmp_path, capsys):
    assert score(tmp_path, "--resume") == 0
    assert "nothing to resume: starting from the beginning" in capsys.readouterr().err
    assert_same(tmp_path, whole)


def test_resume_needs_output(checkpoint, pictures, capsys):
    assert evaluate(pictures, checkpoint, "--resume") == 2
    assert "--resume needs --output FILE.json" in capsys.readouterr().err


def test_a_disk_that_is_full_for_a_while_stops_nothing(score, whole, tmp_path, capsys):
    with contextlib.ExitStack() as disk:

        def fill(stage):
            if stage == "compiled":
                disk.enter_context(no_room(0))
            elif stage == "scored":
                disk.close()

        assert score(tmp_path, on_stage=fill) == 0
    full = os.strerror(errno.EFBIG)
    assert f"{full}; if this run is killed, more has to be scored again" in capsys.readouterr().err
    assert_same(tmp_path, whole)


def test_results_that_could_not_be_written_are_not_scored_again(score, whole, tmp_path, capsys):
    def in_the_way(stage):
        if stage == "scored":
            (tmp_path / "r.json").mkdir()

    assert score(tmp_path, on_stage=in_the_way) == 2
    assert "cannot write" in capsys.readouterr().err
    (tmp_path / "r.json").rmdir()
    assert score(tmp_path, "--resume") == 0
    assert "resumed: 13 of 13" in capsys.readouterr().err
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("resumed", [False, True])
def test_one_evaluation_at_a_time(score, whole, tmp_path, capsys, resumed):
    """Another one is refused before it has saved anything, whatever it is told to do."""
    if resumed:
        kill(score, tmp_path, 2)
    others = []

    def start_others(stage):
        if stage == "begun":
            others.extend(score(tmp_path, *more) for more in ((), ("--resume",), ("--overwrite",)))

    assert score(tmp_path, "--resume", on_stage=start_others) == 0
    assert others == [2, 2, 2]
    busy = "hvit eval: another evaluation is writing {}; wait for it or choose another --output"
    assert capsys.readouterr().err.count(busy.format(tmp_path / "r.json")) == 3
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("name", ["000000000.npz", "000000003.npz", "settings.json"])
def test_no_flipped_bit_goes_unnoticed(killed, name):
    """Every 50th bit, or 7th: refused with one line, or what is read is the same."""
    folder = killed / "r.json.progress"
    about = json.loads((folder / "settings.json").read_text())
    about["config"] = about["options"]

    def read():
        tally = Tally(keep_logits=True)
        with ProgressFolder(killed / "r.json", say=lambda text: None, resume=True) as progress:
            progress.begin(about, tally, 13)
        return repr(tally)

    whole, content, refused = read(), (folder / name).read_bytes(), 0
    for bit in range(0, 8 * len(content), 50 if name.endswith("npz") else 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(flipped)
        try:
            assert read() == whole
        except InputError as error:
            assert "is damaged (" in str(error) or "was begun with" in str(error)
            refused += 1
    assert refused > 100
