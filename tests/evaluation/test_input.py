"""Everything a user can get wrong: one clear line, exit status 2, if possible before the work."""

import contextlib
import errno
import json
import os
import subprocess
import sys

import pytest

import hvit_jax
from hvit_jax.commands.eval import main
from tests.evaluation_setup import (
    ROOT,
    evaluate,
    make_checkpoint,
    make_pictures,
    no_room,
    results_of,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail, and give its one line."""

    def run(status):
        assert status == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert lines[-1].startswith("hvit eval: ")
        assert "Traceback" not in captured.err
        assert sum(line.startswith("hvit eval: ") for line in lines) == 1
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "hourglas"], ["unknown method 'hourglas'", "did you mean 'hourglass'"]),
        (["--method"], ["--method", "expected one argument"]),
        (["--metod", "dense"], ["unknown option --metod", "did you mean --method"]),
        (["--methods", "tome"], ["unknown option --methods", "did you mean --method?"]),
        (["--method", "dense", "-l", "8"], ["dense has no option -l", "hourglass"]),
        (["--method", "hourglass", "--keep-rate", "0.7"], ["no option --keep-rate", "evit"]),
        (["--method", "hourglass", "--no-fuse-token"], ["no option --no-fuse-token", "evit"]),
        (["--method", "hourglass", "-n", "3"], ["num_clusters=3", "not a perfect square", "4"]),
        (["--method", "hourglass", "-n", "2,9"], ["2 x 9 does not fit the 2 x 3 grid"]),
        (["--method", "hourglass", "-l", "3"], ["cluster_location=3", "blocks are 0 to 2"]),
        (["--method", "hourglass", "-l", "two"], ["cluster_location", "whole number", "'two'"]),
        (["--method", "hourglass", "-l"], ["-l", "expected one argument"]),
        (["-r", "20"], ["resolution 20 is not a multiple of the patch size 8", "nearest"]),
        (["-r", "16,24,32"], ["--resolution must be a whole number or 2 whole numbers", "32"]),
        (["-r", "16", "24"], ["unexpected argument '24'", "lists are written with commas"]),
        (["-r", "big"], ["--resolution must be a whole number or 2 whole numbers", "'big'"]),
        (["-b", "0"], ["--batch-size must be at least 1, got 0"]),
        (["-b", "many"], ["--batch-size", "'many'"]),
        (["-j", "-1"], ["--workers must be at least 0, got -1"]),
        (["--dtype", "float16"], ["--dtype", "float16", "bfloat16"]),
        (["--attention", "cudnn"], ["cudnn", "cannot run here"]),
        (["--on-error", "retry"], ["--on-error", "retry", "skip"]),
        (["surplus"], ["unexpected argument 'surplus'"]),
    ],
)
def test_wrong_options(checkpoint, pictures, complaint, words, parts):
    line = complaint(evaluate(pictures, checkpoint, *words))
    for part in parts:
        assert part in line


def test_data_and_checkpoint_come_together(checkpoint, pictures, complaint):
    assert "DATA is given without --checkpoint" in complaint(main([str(pictures)]))
    line = complaint(main(["--checkpoint", str(checkpoint)]))
    assert "--checkpoint DIR is given without DATA" in line
    assert "as 'x'" in complaint(main(["--method", "tome", "--r", "4", "x"]))


def test_wrong_checkpoints(checkpoint, pictures, tmp_path, complaint):
    assert "does not exist" in complaint(evaluate(pictures, tmp_path / "missing"))
    assert "is not a checkpoint" in complaint(evaluate(pictures, tmp_path))
    (tmp_path / "model.json").write_text("{")
    assert "model.json is damaged" in complaint(evaluate(pictures, tmp_path))


def test_wrong_folders(checkpoint, tmp_path, complaint):
    assert "does not exist" in complaint(evaluate(tmp_path / "missing", checkpoint))
    assert "no class folders" in complaint(evaluate(tmp_path, checkpoint))
    (tmp_path / "class").mkdir()
    assert "no pictures in its class folders" in complaint(evaluate(tmp_path, checkpoint))
    make_pictures(tmp_path / "three", classes=3)
    line = complaint(evaluate(tmp_path / "three", checkpoint))
    assert "the data has 3 classes, the checkpoint's head has 7" in line


def test_checkpoint_without_head(pictures, tmp_path, complaint):
    config = hvit_jax.ViTConfig(
        (16, 24), patch_size=8, depth=1, width=8, heads=1, mlp_width=8, num_classes=0
    )
    headless = make_checkpoint(tmp_path / "headless", config)
    assert "no classification head" in complaint(evaluate(pictures, headless))


@pytest.fixture
def partly_damaged(tmp_path):
    folder = make_pictures(tmp_path / "data")
    (folder / "c2" / "002.png").write_bytes(b"not a picture")
    whole = (folder / "c3" / "003.png").read_bytes()
    (folder / "c3" / "003.png").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_picture_stops(checkpoint, partly_damaged, complaint, workers):
    line = complaint(evaluate(partly_damaged, checkpoint, workers=workers))
    assert "picture c2/002.png: not a picture" in line and "--on-error skip" in line


def test_damaged_picture_loses_nothing_scored_before(
    checkpoint, partly_damaged, tmp_path, complaint
):
    output = tmp_path / "results.json"
    line = complaint(
        main(
            [str(partly_damaged), "--checkpoint", str(checkpoint), "-j", "0", "-b", "1"]
            + ["--output", str(output)]
        )
    )
    assert "picture c2/002.png: not a picture" in line
    results = json.loads(output.read_text())
    assert results["partial"] is True and results["images"] > 0


def test_damaged_pictures_are_skipped_and_listed(checkpoint, partly_damaged, tmp_path, capsys):
    results, predictions = results_of(
        partly_damaged, checkpoint, tmp_path, "--on-error", "skip", "-b", "4"
    )
    assert [text.split(":")[0] for text in results["skipped"]] == [
        "picture c2/002.png",
        "picture c3/003.png",
    ]
    assert results["images"] == 8 and len(predictions["logits"]) == 8
    assert not {"c2/002.png", "c3/003.png"} & set(predictions["paths"].tolist())
    out = capsys.readouterr().out
    assert "2 unreadable pictures were left out" in out and "picture c3/003.png: " in out


def test_nothing_but_damaged_pictures(checkpoint, tmp_path, complaint):
    folder = make_pictures(tmp_path / "data", count=2)
    for path in folder.glob("*/*.png"):
        path.write_bytes(b"")
    line = complaint(evaluate(folder, checkpoint, "--on-error", "skip"))
    assert "none of the 2 pictures could be read" in line


@pytest.mark.parametrize(("flag", "end"), [("--output", ".json"), ("--predictions", ".npz")])
def test_destinations_are_checked_before_the_work(pictures, tmp_path, complaint, flag, end):
    """Before even the checkpoint is looked for, which does not exist."""
    existing, folder, pipe = (tmp_path / f"{name}{end}" for name in ("existing", "folder", "pipe"))
    existing.write_text("old")
    folder.mkdir()
    os.mkfifo(pipe)
    for path, part in (
        (existing, "exists already; --overwrite replaces it"),
        (folder, "is a folder"),
        (tmp_path / "no" / existing.name, f"there is no folder {tmp_path / 'no'}"),
        (existing / existing.name, f"there is no folder {existing}"),
        (f"/proc/results{end}", f"cannot write /proc/results{end}"),
        (pipe, "no regular file"),
        (tmp_path / "results.csv", f"{flag} takes a name that ends in {end}, got {tmp_path}"),
        ("", f"{flag} takes a name that ends in {end}, got ."),
    ):
        assert part in complaint(evaluate(pictures, "unread", flag, path))
    assert existing.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == sorted(path.name for path in (existing, folder, pipe))


def test_full_disk_still_prints_results(checkpoint, pictures, tmp_path, capsys):
    old = tmp_path / "results.json"
    old.write_text("old")
    words = ("--output", old, "--predictions", tmp_path / "out.npz", "--overwrite")
    with contextlib.ExitStack() as disk:

        def fill(stage):
            if stage == "scored":
                disk.enter_context(no_room(0))

        assert evaluate(pictures, checkpoint, *words, on_stage=fill) == 2
    captured = capsys.readouterr()
    assert "top-1 (%)" in captured.out and "written" not in captured.out
    line = captured.err.splitlines()[-1]
    assert f"cannot write {old}: {os.strerror(errno.EFBIG)}" in line
    assert f"cannot write {tmp_path / 'out.npz'}: {os.strerror(errno.EFBIG)}" in line
    assert os.listdir(tmp_path) == ["results.json"] and old.read_text() == "old"


def test_help_shows_options_of_the_method(capsys):
    for words, shown, hidden in (
        (["--help"], "--on-error", "--num-clusters"),
        (["--method", "hourglass", "--help"], "--num-clusters", "--keep-rate"),
    ):
        with pytest.raises(SystemExit) as exit:
            main(words)
        assert exit.value.code == 0
        out = capsys.readouterr().out
        assert shown in out and hidden not in out


def test_script_reports_without_traceback(tmp_path):
    words = [sys.executable, str(ROOT / "eval.py"), "nowhere", "--checkpoint", "nowhere"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "hvit eval: checkpoint nowhere does not exist\n"


def test_a_named_pipe_is_no_picture(checkpoint, tmp_path):
    """Nobody writes to it, so that opening it would never end."""
    folder = make_pictures(tmp_path / "pictures")
    os.mkfifo(folder / "c0" / "pipe.png")
    results, _ = results_of(folder, checkpoint, tmp_path, "--on-error", "skip")
    assert results["images"] == 10
    assert results["skipped"] == ["picture c0/pipe.png: not a regular file"]


@pytest.mark.parametrize("nobody_reads", [False, True])
def test_results_are_kept_where_they_cannot_be_printed(
    pictures, checkpoint, tmp_path, nobody_reads
):
    reader, writer = os.pipe()
    os.close(reader)
    files = ["--output", str(tmp_path / "r.json"), "--predictions", str(tmp_path / "p.npz")]
    words = [str(pictures), "--checkpoint", str(checkpoint), "-j", "0", *files]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "eval.py"), *words],
            stdout=writer if nobody_reads else full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    os.close(writer)
    assert done.returncode == (141 if nobody_reads else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 10
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "p.npz"}
