"""The training command on a handful of pictures: it learns, resumes exactly, refuses nonsense."""

import json
import shutil
import signal

import jax
import numpy as np
import pytest

from hvit_jax.checkpoint import read_description
from hvit_jax.commands.train import main
from hvit_jax.config import ViTConfig
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.folder import read_folder
from hvit_jax.reducers import make_reducer
from hvit_jax.training import TrainConfig, train
from hvit_jax.training.data import Augmented, training_batches
from tests.evaluation_setup import make_checkpoint
from tests.training_setup import (
    RECIPE,
    SIZES,
    command,
    make_data,
    parameters,
    rows,
    signals_before_batch,
)

SMALL = ViTConfig(16, patch_size=8, depth=2, width=16, heads=2, mlp_width=32, num_classes=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_it_learns_resumes_exactly_and_fine_tunes(data, tmp_path, capsys):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert main([str(data), "--output", str(straight), *SIZES, *RECIPE]) == 0
    straight_out = capsys.readouterr().out
    losses = [float(row["loss"]) for row in rows(straight)]
    assert len(losses) == 9 and losses[-1] < 0.5 * losses[0]
    description = read_description(straight / "checkpoint")
    assert description.classes == ("dark", "light") and description.config.num_classes == 2
    settings = json.loads((straight / "settings.json").read_text())
    assert description.source == {
        "format": "hvit train",
        **{name: value for name, value in settings.items() if name != "model"},
    }
    assert (settings["method"], settings["config"]["seed"]) == ("dense", 3)
    assert settings["devices"] == 1 and settings["versions"]["jax"] == jax.__version__
    assert settings["data_sha256"] == data_sha256(read_folder(data, splits=("train",)))

    words = [data, "--output", broken, *SIZES, *RECIPE]
    assert command(words, batches=signals_before_batch(7, signal.SIGINT)) == 130
    assert "interrupted after step 8; --resume continues from there" in capsys.readouterr().err
    assert not (broken / "checkpoint").exists()
    capsys.readouterr()
    changed = [*RECIPE, "--learning-rate", "0.5"]
    assert main([str(data), "--output", str(broken), "--resume", *SIZES, *changed]) == 2
    message = f"{broken} was begun with --learning-rate 0.001, now 0.5; repeat the first command"
    assert message in capsys.readouterr().err
    assert main([str(data), "--output", str(broken), "--resume", *SIZES, *RECIPE]) == 0
    assert "from step 8" in capsys.readouterr().out
    assert [row["loss"] for row in rows(broken)] == [row["loss"] for row in rows(straight)]
    jax.tree.map(np.testing.assert_array_equal, parameters(broken), parameters(straight))

    # A log file gets a line a row, and is told what an epoch is.
    assert "; 6 epochs of 3 steps: 18 steps of 8 from step 0 on 1 x cpu\n" in straight_out
    lines = [line for line in straight_out.splitlines() if "/18 steps, loss " in line]
    assert [line.split("/")[0] for line in lines] == [str(step) for step in range(2, 19, 2)]

    tuned = tmp_path / "tuned"
    start = ["--checkpoint", str(straight / "checkpoint"), "-r", "24"]
    short = "--epochs 1 -b 8 --warmup-epochs 0 --dtype bfloat16 --method hourglass -l 1".split()
    assert main([str(data), "--output", str(tuned), *start, *short]) == 0
    assert "bfloat16 is slower than float32 on a CPU\n" in capsys.readouterr().out
    assert parameters(tuned)["pos_embedding"].shape == (1 + 36, 16)
    # Who evaluates it finds the method that it was trained under.
    source, sizes = (
        getattr(read_description(tuned / "checkpoint"), n) for n in ("source", "config")
    )
    method = make_reducer(source["method"], **source["args"])
    assert method == make_reducer("hourglass", cluster_location=1).resolve(sizes)
    assert main([str(data), "--output", str(tuned), "--resume", *start, *short]) == 0
    assert f"{tuned} is finished: {tuned / 'checkpoint'}" in capsys.readouterr().out
    assert main([str(data), "--output", str(tuned), "--resume", *start, *short, "--seed", "1"]) == 2
    assert "was begun with --seed 0, now 1" in capsys.readouterr().err

    probed = tmp_path / "probed"
    head = ["--checkpoint", str(straight / "checkpoint"), "--train", "head", "--epochs", "1"]
    assert main([str(data), "--output", str(probed), *head, "-b", "8"]) == 0
    before, after = parameters(straight), parameters(probed)
    assert np.any(before.pop("head")["kernel"] != after.pop("head")["kernel"])
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_run_with_a_teacher_goes_on_exactly(data, tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path / "from", SMALL, ("dark", "light"))
    start = ["--checkpoint", checkpoint, "--method", "evit", "--drop-locations", "0"]
    words = [data, *start, *"--distill --epochs 2 -b 8 --layer-decay 0.5 --output".split()]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command([*words, straight]) == 0
    assert command([*words, broken], batches=signals_before_batch(2, signal.SIGINT)) == 130
    assert command([*words, broken, "--resume", "--distill-weight", "1"]) == 2
    assert "was begun with --distill-weight 0.5, now 1.0;" in capsys.readouterr().err
    assert command([*words, broken, "--resume"]) == 0
    jax.tree.map(np.testing.assert_array_equal, parameters(broken), parameters(straight))
    source = read_description(straight / "checkpoint").source
    assert source["config"]["distill"] and source["method"] == "evit"


def test_what_a_user_should_know_of_methods(data, tmp_path, capsys):
    """That of the checkpoint is not taken over; the one that is asked for saves nothing."""
    evit = make_reducer("evit", drop_locations=(1,))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", trained=evit)
    words = ["--checkpoint", checkpoint, "--epochs", "1", "-b", "8", "--method", "ats"]
    # A second signal does not wait for the first step, which would be compiled.
    stop = signals_before_batch(0, signal.SIGINT, signal.SIGINT)
    assert command([data, "--output", tmp_path / "run", *words], batches=stop) == 130
    said = capsys.readouterr().out
    assert "the checkpoint was trained with evit; this run trains with ats\n" in said
    assert "ats saves nothing without --max-tokens: every block has room for all 7 tokens; " in said


def test_a_row_counts_each_step_once_whatever_log_every_was(data, tmp_path):
    """The state of step 8, when rows were written every 2 steps, begins the row of step 12."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    words = [data, *SIZES, *RECIPE, "--epochs", "4", "--output"]
    assert command([*words, straight, "--log-every", "1"]) == 0
    assert command([*words, broken], batches=signals_before_batch(7, signal.SIGINT)) == 130
    assert command([*words, broken, "--resume", "--log-every", "4"]) == 0
    losses = [float(row["loss"]) for row in rows(straight)]
    expected = {2: losses[:2], 4: losses[2:4], 6: losses[4:6], 8: losses[6:8], 12: losses[8:]}
    found = {int(row["step"]): float(row["loss"]) for row in rows(broken)}
    assert found == {step: pytest.approx(np.mean(part)) for step, part in expected.items()}


def test_batches_do_not_depend_on_where_they_start(data):
    folder = read_folder(data, splits=("train",))
    pictures = Augmented(folder, (8, 12), crop_scale=0.5, flip=True)
    options = dict(batch_size=5, seed=1)
    whole, late = (training_batches(pictures, **options, first_step=step) for step in (0, 6))
    expected = [next(whole) for _ in range(8)][6:]
    for batch in expected:
        again = next(late)
        assert batch["pixels"].shape == (5, 8, 12, 3)
        np.testing.assert_array_equal(batch["pixels"], again["pixels"])
        np.testing.assert_array_equal(batch["label"], again["label"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --checkpoint, --model, or the sizes"),
        (["--model", "vit_b16", "--depth", "2"], "give one of --checkpoint"),
        (["--depth", "2", "-r", "16"], "also needs --patch-size, --width, --heads, --mlp-width"),
        (["--model", "vit_x"], "unknown model 'vit_x'"),
        ([*SIZES, "-r", "17"], "resolution 17 is not a multiple of the patch size 4"),
        ([*SIZES, "--epochs", "0"], "--epochs must be above 0, got 0"),
        ([*SIZES, "--epochs", "inf"], "--epochs must be a number, got 'inf'"),
        ([*SIZES, "--seed", "-1"], "--seed must be at least 0 and at most 4294967295, got -1"),
        ([*SIZES, "--crop-scale", "2"], "--crop-scale must be at least 0.001 and at most 1, got 2"),
        (
            [*SIZES, "--layer-decay", "1.5"],
            "--layer-decay must be at least 0.001 and at most 1, got 1.5",
        ),
        ([*SIZES, "--ema", "1"], "--ema must be at least 0 and at most 0.999999, got 1"),
        ([*SIZES, "--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        ([*SIZES, "--val-every", "0"], "--val-every must be above 0, got 0"),
        ([*SIZES, "--dtype", "float16"], "--dtype must be one of float32, bfloat16: 'float16'"),
        ([*SIZES, "--train", "neck"], "--train must be one of whole, head: 'neck'"),
        ([*SIZES, "--train", "head", "--layer-decay", "0.5"], "--layer-decay has no effect with"),
        ([*SIZES, "--train", "head", "--remat"], "--remat saves nothing with --train head"),
        (
            [*SIZES, "-b", "9", "--accumulate", "2"],
            "--batch-size 9 does not divide by 2 (--accumulate 2); the nearest that does: 8",
        ),
        ([*SIZES, "--warmup-epochs", "11"], "--warmup-epochs 11 must be at most --epochs 10"),
        ([*SIZES, "--keep-rate", "0.5"], "has no option --keep-rate; it is one of evit"),
        (["--checkpoint", "missing"], "checkpoint missing does not exist"),
        ([*SIZES, "--lr", "0.1"], "unknown option --lr, did you mean --learning-rate?"),
        ([*SIZES, "--bs", "8"], "unknown option --bs, did you mean --batch-size?"),
        ([*SIZES, "--rand-augment", "0,9"], "at least 1 operation and a strength from 0 to 30"),
        ([*SIZES, "--rand-augment", "2,31"], "strength from 0 to 30, got 2,31"),
        ([*SIZES, "--rand-augment", "2"], "--rand-augment must be 2 whole numbers"),
        ([*SIZES, "--mixup", "-1"], "--mixup must be at least 0, got -1"),
        ([*SIZES, "--distill", "--method", "tome"], "--distill needs a --checkpoint with a"),
        (["--checkpoint", "c", "--distill", "--new-head"], "--distill needs a --checkpoint with"),
        (["--checkpoint", "c", "--distill"], "--distill teaches a reduced model; name a method"),
        ([*SIZES, "--distill-weight", "1"], "--distill-weight has no effect without --distill"),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert main([str(data), "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not output.exists()


def test_an_existing_or_foreign_output_is_refused(data, tmp_path, capsys):
    assert main([str(data), "--output", str(tmp_path), *SIZES]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([str(data), "--output", str(tmp_path), "--resume", *SIZES]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


def test_resume_begins_where_there_is_no_output(data, tmp_path, capsys):
    output = tmp_path / "run"
    command = [str(data), "--output", str(output), "--resume", *SIZES, *RECIPE, "--epochs", "1"]
    assert main(command) == 0
    assert capsys.readouterr().err == "nothing to resume: starting from the beginning\n"
    assert (output / "checkpoint").is_dir()
    kept = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert main(command) == 0
    line = f"{output} is finished: {output / 'checkpoint'} is its result\n"
    assert capsys.readouterr() == (line, "")
    assert kept == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_picture_is_named_and_leaves_the_output_free(tmp_path, capsys, workers):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "bad.png").write_bytes(b"no picture")
    output = tmp_path / "run"
    command = [str(tmp_path / "data"), "--output", str(output), *SIZES, "-j", workers, "-b", "1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "/bad.png: not a picture" in error and error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize(
    ("save_every", "message"),
    [("3", "--resume continues from the newest saved state"), ("99", "nothing was saved")],
)
def test_a_second_signal_says_what_is_kept(data, tmp_path, capsys, save_every, message):
    output = tmp_path / "run"
    words = [data, "--output", output, *SIZES, *RECIPE, "--save-every", save_every]
    stop = signals_before_batch(5, signal.SIGINT, signal.SIGINT)
    assert command(words, batches=stop) == 130
    assert f"interrupted; {message}" in capsys.readouterr().err
    assert output.exists() == (save_every == "3")


def test_pictures_that_went_are_missed(tmp_path, capsys):
    """Another number of pictures means other steps, in another order."""
    data, output = make_data(tmp_path / "data"), tmp_path / "run"
    words = [str(data), "--output", str(output), *SIZES, *RECIPE]
    assert main([*words, "--save-every", "3"]) == 0
    shutil.rmtree(output / "checkpoint")
    (data / "train" / "dark" / "3.png").unlink()
    assert main([*words, "--resume", "--save-every", "3"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "with pictures 24 with" in errors and "now 23" in errors


def test_it_is_callable_from_python(data, tmp_path):
    sizes = dict(patch_size=8, depth=1, width=8, heads=1, mlp_width=8, resolution=16)
    config = TrainConfig(str(data), tmp_path / "run", **sizes, batch_size=8, epochs=1, log_every=2)
    result = train(config)
    assert (result.steps, result.metrics.step, result.validation) == (3, 3, None)
    assert f"{result.metrics.loss}" == rows(tmp_path / "run")[-1]["loss"]
    assert read_description(result.checkpoint).config.width == 8
