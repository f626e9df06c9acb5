"""Validation while training: every picture once, without a trace in training; and TensorBoard."""

import json
import os
import signal
import struct
import sys

import pytest

from hvit_jax.commands.eval import main as evaluate
from hvit_jax.training.loop import ends_epoch
from hvit_jax.training.records import MetricsRow, append_row, open_table
from hvit_jax.training.validation import make_validate
from tests.training_setup import column, make_data, rows, train

tensorboardX = pytest.importorskip("tensorboardX")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), validation=5)


def events(folder):
    """Read TensorBoard's files as (tag, step); where a run went on, the tag is "start"."""
    found = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = tensorboardX.proto.event_pb2.Event.FromString(content[12 : 12 + length])
            found += [("start", event.step)] if event.HasField("session_log") else []
            found += [(value.tag, event.step) for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_validation_counts_what_eval_counts_and_leaves_training_alone(data, tmp_path, capsys):
    seen, without = tmp_path / "seen", tmp_path / "without"
    options = ["--epochs", "2", "--ema", "0.5"]
    assert train(data, seen, *options, "--tensorboard") == 0
    # 24 pictures in steps of 8: epochs end at steps 3 and 6.
    assert [(row["step"], row["epoch"]) for row in rows(seen, "validation")] == [
        ("3", "1.0"),
        ("6", "2.0"),
    ]
    assert "epoch 2.0: top-1" in capsys.readouterr().out
    results = tmp_path / "results.json"
    command = [data, "--checkpoint", seen / "checkpoint", "-j", "0", "--output", results]
    assert evaluate([str(word) for word in command]) == 0
    scored = json.loads(results.read_text())
    assert scored["images"] == 10
    assert column(seen, "top1", "validation")[-1] == scored["top1"]
    assert column(seen, "loss", "validation")[-1] == pytest.approx(scored["loss"], rel=1e-5)
    assert events(seen / "tensorboard").count(("val/top1", 3)) == 1
    assert events(seen / "tensorboard").count(("train/loss", 2)) == 1

    assert train(data, without, *options, "--val", "none") == 0
    assert rows(without, "validation") == []
    assert column(without, "loss") == column(seen, "loss")


def test_an_interrupted_validation_is_made_up_for(data, tmp_path):
    output, options = tmp_path / "run", ("--epochs", "2", "--tensorboard")

    def interrupted(*arguments, **how):
        validate = make_validate(*arguments, **how)

        def with_signal(parameters, on_batch):
            os.kill(os.getpid(), signal.SIGTERM)
            return validate(parameters, on_batch)

        return with_signal

    assert train(data, output, *options, make_validate=interrupted) == 143
    assert rows(output, "validation") == [] and len(rows(output)) == 1
    assert train(data, output, "--resume", *options) == 0
    assert column(output, "step", "validation") == [3, 6]
    # TensorBoard hides what an earlier file has from this step on.
    assert ("start", 4) in events(output / "tensorboard")
    assert [step for tag, step in events(output / "tensorboard") if tag == "val/top1"] == [3, 6]


def test_a_validation_picture_that_is_damaged_costs_no_steps(tmp_path, capsys):
    data, output = make_data(tmp_path / "data", validation=2), tmp_path / "run"
    bad = data / "val" / "dark" / "0.png"
    whole = bad.read_bytes()
    bad.write_bytes(b"no picture")
    assert train(data, output, "--epochs", "1") == 2
    error = capsys.readouterr().err
    assert "val/dark/0.png" in error and "--on-error" not in error and error.count("\n") == 1
    bad.write_bytes(whole)
    assert train(data, output, "--resume", "--epochs", "1") == 0
    assert "from step 3" in capsys.readouterr().out
    assert column(output, "step", "validation") == [3]


@pytest.mark.parametrize(
    ("batch_size", "pictures", "every", "steps"),
    [
        (8, 24, 1.0, [3, 6, 9]),
        (10, 24, 1.0, [3, 5, 8]),
        (8, 24, 0.5, [2, 3, 5, 6, 8, 9]),
        (50, 24, 1.0, list(range(1, 10))),
    ],
)
def test_epochs_end_where_the_last_picture_is_seen(batch_size, pictures, every, steps):
    ends = [step for step in range(10) if ends_epoch(step, batch_size, pictures, every)]
    assert ends == steps


def test_other_classes_and_missing_folders_are_refused(data, tmp_path, capsys):
    other = make_data(tmp_path / "other", classes=("dark", "pink"), validation=1)
    output = tmp_path / "run"
    for value, message in (
        (other, "(2, only here: pink) are not those of training (2, only here: light)"),
        (tmp_path / "missing", "missing does not exist"),
    ):
        assert train(data, output, "--val", value) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not output.exists()


def test_tensorboard_that_is_missing_is_said_before_any_work(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert train(data, tmp_path / "run", "--tensorboard") == 2
    error = capsys.readouterr().err
    assert "pip install 'hvit-jax[tensorboard]'" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


HEADER = "step,epoch,loss,accuracy,images_per_second"


@pytest.mark.parametrize("torn", ["3,0.3,1,1,1\n4", "2,0.3,1,1", "2", "", "x,0.3,1,1,1\n", "2,1\n"])
def test_rows_behind_the_step_and_rows_cut_off_are_dropped(tmp_path, torn):
    path = tmp_path / "rows.csv"
    path.write_text(f"{HEADER}\n1,0.1,0.5,0.5,9.0\n2,0.2,0.4,0.75,9.0\n{torn}")
    assert open_table(path, MetricsRow, 2) == MetricsRow(2, 0.2, 0.4, 0.75, 9.0)
    append_row(path, (3, 0.3, 0.25, 1.0, 9.0))
    assert path.read_text().split() == [
        *(HEADER, "1,0.1,0.5,0.5,9.0", "2,0.2,0.4,0.75,9.0", "3,0.3,0.25,1.0,9.0")
    ]


@pytest.mark.parametrize("content", [None, "", "step,ep"])
def test_a_table_begins_with_its_header(tmp_path, content):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_text(content)
    assert open_table(path, MetricsRow, 9) is None and path.read_text().split() == [HEADER]
