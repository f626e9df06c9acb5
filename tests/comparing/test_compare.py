"""`hvit compare`: what it tries, chooses, keeps and refuses."""

import base64
import csv
import dataclasses
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import hvit_jax
from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.commands.compare import DESCRIPTION, PROGRAM, main
from hvit_jax.commands.eval import main as evaluate
from hvit_jax.commands.flags import parse
from hvit_jax.comparing import CompareConfig, compare
from hvit_jax.comparing.classifying import load_sample
from hvit_jax.comparing.report import summary, table, unsteady
from hvit_jax.comparing.rows import Goal, Trial, choose, front, lowres_at, rivals, verdict
from hvit_jax.comparing.settings import Setting
from hvit_jax.comparing.trials import Trials
from hvit_jax.data.source import open_source, take_evenly
from hvit_jax.models.parameters import init_parameters
from hvit_jax.system.run import run
from hvit_jax.system.signals import Stopped
from tests.evaluation_setup import CONFIG, make_checkpoint, make_pictures
from tests.scale_setup import EIGHT, run_python, slurm_task

# With one setting of ATS, as the test that compares it has in its own process.
COMPARE_ATS = """
import sys
from tests.comparing.test_compare import ATS, configured
from hvit_jax.comparing import compare
compare(configured(*sys.argv[1:]), settings=ATS)
"""
ATS = [Setting(hvit_jax.make_reducer("ats", blocks=(1, 2)).resolve(CONFIG), 25.0)]
# What is tried of ToMe at these levels: r = 1 and r = 2; of lower resolutions one.
LEVELS = ["--levels", "0.9,0.76"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    checkpoint = make_checkpoint(folder / "checkpoint")
    return [str(make_pictures(folder / "pictures")), "--checkpoint", str(checkpoint)]


@pytest.fixture
def fast(inputs):
    """Four settings: dense, one of a lower resolution, and ToMe with r = 1 and 2."""
    quick = ["--methods", "tome", *LEVELS, "-j", "0", "-b", "4", "--seconds", "0.001"]
    return [*inputs, *quick]


def configured(*words):
    return parse(CompareConfig, list(map(str, words)), program=PROGRAM, description=DESCRIPTION)


def twice_as_fast(works, seconds):
    """Times of a method, and of the dense model beside it."""
    return [[1.0] * 5, [2.0] * 5][: len(works)]


class Quick(Trials):
    """Notes what is measured, and measures without running anything; `fail` may raise instead."""

    def __init__(self, *arguments, measured, fail=lambda r: None):
        super().__init__(*arguments)
        self.measured, self.fail = measured, fail

    def measure(self, setting):
        r = setting.reducer.options().get("r", setting.method)
        self.measured.append(r)
        self.fail(r)
        speedup = 1.0 + r / 2 if isinstance(r, int) else 1.0
        scores = {"top1": score(50.0), "agreement": score(100.0)}
        figures = {"scores": scores, "draws": "50,50,50,50", "throughput": 8.0, "report": {}}
        figures |= {"speedup": speedup, "speedup_range": [1.0, 2.0]}
        return dataclasses.replace(self.row(setting), **figures)


def score(value, change=0.0):
    ends = [change - 1, change + 1]
    return {"value": value, "interval": [0.0, 1.0], "change": change, "change_interval": ends}


def pretend(words, fail=lambda r: None):
    """Compare without measuring; the values of r, or methods, that would have been measured."""
    measured = []
    compare(configured(*words), bench=functools.partial(Quick, measured=measured, fail=fail))
    return measured


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def row(name, speedup, top1, loss=0.0, error=None, **more):
    scores = {} if top1 is None else {"top1": score(top1, -loss)}
    about = {"method": "tome", "model": name, "args": {}, "resolution": [16, 24], "batch": 4}
    about |= {"dtype": "float32", "gflops": 1.0, "tried": {}, "devices": 1, "cost": 0.5}
    about |= {"speedup": speedup, "scores": scores, "error": error}
    return Trial(**{**about, **more})


R2 = {"r": 2, "proportional_attention": True}
ALL = ["dense", "lowres", 1, 2]


class TestChoice:
    rows = (
        row("dense", 1.0, 90.0),
        row("slow", 0.8, 95.0, -5.0),
        row("mild", 1.5, 89.5, 0.5),
        row("beaten", 1.4, 89.5, 0.5),
        row("strong", 2.0, 80.0, 10.0),
        row("broken", None, None, None, "out of memory"),
    )

    def test_front(self):
        assert [each.model for each in front(self.rows)] == ["strong", "mild", "dense", "slow"]

    def test_dense_is_shown_without_a_number_where_it_is_beaten(self):
        rows = [
            dataclasses.replace(each, throughput=1.0, speedup_range=[1.0, 2.0], memory_bytes=10**6)
            for each in (row("dense", 1.0, 90.0), row("best", 2.0, 91.0, -1.0))
        ]
        rows = [dataclasses.replace(rows[0], method="dense"), dataclasses.replace(rows[1], args=R2)]
        head, dense, best = table([dataclasses.replace(rows[0], cost=1.0), rows[1]], "images")
        assert best[:2] == ("1", "tome r=2") and best[4] == "+1.0 (+0.0 to +2.0)"
        assert dense[:2] == ("", "dense") and dense[4] == "" and dense[-1] == "1"
        assert head[3] == "top-1 (%)" and "images/s" in head

    @pytest.mark.parametrize(
        ("goal", "name", "reached"),
        [
            (Goal(speedup=1.4), "mild", True),
            (Goal(speedup=1.6), "strong", True),
            (Goal(speedup=2.1), "strong", False),
            (Goal(drop=0.5), "mild", True),
            (Goal(drop=20.0), "strong", True),
            (Goal(drop=0.1), "mild", False),
            (Goal().of(rows[0]), "mild", True),  # One point.
        ],
    )
    def test_goals(self, goal, name, reached):
        chosen, found = choose(self.rows, goal)
        assert (chosen and chosen.model, found) == (name, reached)

    @pytest.mark.parametrize("goal", [Goal(speedup=1.5), Goal(drop=50.0)])
    def test_nothing_faster_than_dense(self, goal):
        assert choose(self.rows[:2], goal) == (None, False)

    def test_less_depth_error_is_better_and_may_grow_by_a_twentieth(self):
        scores = {name: {"rmse": score(value, value - 0.5)} for name, value in
                  {"dense": 0.5, "near": 0.52, "far": 0.6}.items()}  # fmt: skip
        rows = [row(name, 1.0 + place, 1.0, scores=each, draws="0")
                for place, (name, each) in enumerate(scores.items())]  # fmt: skip
        goal = Goal().of(rows[0])
        assert goal.drop == pytest.approx(0.025) and choose(rows, goal)[0].model == "near"
        assert [each.model for each in front(rows)] == ["far", "near", "dense"]

    def test_uncertain_speeds_are_said(self):
        steady = row("steady", 2.0, 90.0, speedup_range=[1.9, 2.1])
        torn = row("torn", 2.0, 90.0, speedup_range=[1.0, 3.0])
        assert unsteady([steady, steady, torn]) == []
        assert "was 3.0 times the slowest" in unsteady([steady, torn, torn])[0]

    def test_a_baseline_is_as_good_where_the_draws_do_not_tell_them_apart(self):
        chosen = row("chosen", 2.0, 90.0, draws="90,91,89")
        draws = {"as good": "89,91.5,88", "worse": "89,90,88"}
        found = [row(name, 2.0, 89.0, method="lowres", draws=each) for name, each in draws.items()]
        dearer = row("dearer", 2.0, 90.0, method="lowres", draws=chosen.draws, cost=0.6)
        assert [each.model for each in rivals([chosen, *found, dearer], chosen)] == ["as good"]
        good, worse = found
        some = [chosen, dataclasses.replace(good, cost=0.4)]
        assert verdict(chosen, some, some).startswith("not told from lowres 16x24 (+1.0, ")
        some = [chosen, dataclasses.replace(worse, cost=0.4)]
        assert verdict(chosen, some, some) == "better than lowres 16x24 (+1.0, +1.0 to +1.0)"
        assert verdict(worse, some, some) == "a baseline"

    def test_a_difference_that_may_be_none_tells_nothing_apart(self):
        chosen = row("chosen", 2.0, 90.0, draws=",".join(["90"] * 4 + ["91"] * 96))
        other = row("other", 2.0, 90.0, method="random", draws=",".join(["90"] * 100))
        assert verdict(chosen, [chosen, other], []) == "not told from random (+0.0, +0.0 to +1.0)"

    def test_a_method_is_held_against_the_line_between_two_resolutions(self):
        chosen = row("chosen", 2.0, 90.0, draws="90,90", cost=0.5)
        less = row("less", 3.0, 80.0, method="lowres", draws="78,82", cost=0.4)
        more = row("more", 1.5, 90.0, method="lowres", draws="86,94", cost=0.8)
        dense = row("dense", 1.0, 95.0, method="dense", draws="95,95", cost=1.0)
        rows = [dense, more, less, chosen]
        found = verdict(chosen, [chosen, less], rows)
        assert found == "better than lowres at 0.50 (+7.5, +5.1 to +9.9)"
        assert lowres_at(rows, 0.9).value == pytest.approx(92.5)
        assert lowres_at(rows, 0.3) is None

    def test_one_point_is_one_point_however_it_is_rounded(self):
        dense, one = 100 * 322 / 500, 100 * 317 / 500
        assert dense - one > 1
        assert Goal(drop=1.0).reached(row("one", 2.0, one, dense - one))


def test_the_named_command_gives_what_was_measured(fast, tmp_path, capsys):
    output, lines, page = (tmp_path / f"s.{end}" for end in ("json", "csv", "html"))
    files = ["--output", output, "--output", f"{lines},{page}", "--drawn", "1"]
    words = [*fast, "--levels", "0.9", *files, "--max-drop", "100", "--dtype", "bfloat16"]
    config = configured(*words)
    assert compare(config, bench=functools.partial(Trials, timer=twice_as_fast)).reached
    printed, messages = capsys.readouterr()
    assert messages.count("bfloat16 is slower than float32 on a CPU\n") == 1
    content = read(output)
    rows = content["rows"]
    assert [each["method"] for each in rows] == ["dense", "lowres", "tome"]
    assert rows[2]["args"]["r"] == 1
    assert rows[1]["resolution"] == [8, 16] and rows[1]["cost"] == pytest.approx(0.498, abs=1e-3)
    assert content["pictures"] == 10 and content["bootstrap"]["draws"] == len(
        rows[1]["draws"].split(",")
    )
    assert [each["speedup"] for each in rows] == [1.0, 2.0, 2.0]
    assert rows[1]["throughput"] == 4.0
    assert rows[0]["scores"]["kl"] == {
        "value": 0.0, "interval": [0.0, 0.0], "change": 0.0, "change_interval": [0.0, 0.0],
    }  # fmt: skip
    table = list(csv.DictReader(lines.read_text().splitlines()))
    assert float(table[2]["kl"]) == rows[2]["scores"]["kl"]["value"] > 0
    assert table[2]["name"] == "tome r=1" and table[1]["name"] == "lowres 8x16"
    assert "2.00 to 2.00" in printed
    assert "3/3 tome r=1: top-1 (%) " in messages and "against dense, 2.00 x dense\n" in messages
    check_page(page, ["dense", "tome r=1", "lowres 8x16", "beside the baselines", "a baseline"], 4)
    (command,) = [line for line in printed.splitlines() if line.startswith("hvit eval")]
    result = tmp_path / "r.json"
    assert evaluate([*shlex.split(command)[2:], "-j", "0", "--output", str(result)]) == 0
    found = read(result)
    (mine,) = [
        each for each in rows
        if (each["args"], each["resolution"]) == (found["args"], found["resolution"])
        and each["method"] != "dense"
    ]  # fmt: skip
    assert found["dtype"] == "bfloat16"
    for name in ("top1", "top5"):
        assert found[name] == mine["scores"][name]["value"]
    (python,) = [line for line in printed.splitlines() if line.startswith("hvit_jax.load(")]
    model = eval(python, {"hvit_jax": hvit_jax})
    assert model.reducer.options() == mine["args"] and model.dtype == "bfloat16"
    assert list(model.config.image_shape) == mine["resolution"]


def check_page(path, words, pictures):
    """A report has what it should, in itself: two plots, and pictures that can be read."""
    text = path.read_text()
    assert text.startswith("<!doctype html>") and text.count("<svg ") == 2
    assert all(word in text for word in words)
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    sizes = {Image.open(io.BytesIO(base64.b64decode(each))).size for each in found}
    assert text.count("<img ") == len(found) == pictures and all(min(size) >= 24 for size in sizes)
    assert not re.search(r"<(script|link|iframe)|(src|href)=.http", text)
    names = re.findall(r' id="([^"]+)"', text)
    assert len({*names}) == len(names) and {*re.findall(r'(?:url\(|href=")#([^")]+)', text)} <= {
        *names
    }


def test_a_setting_that_fails_does_not_stop_the_others(fast, tmp_path, capsys):
    output = tmp_path / "s.json"
    errors = [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")]

    def fail(r):
        if errors and r == 1:
            raise errors.pop()

    words = [*fast, "--output", output]
    assert pretend(words, fail) == ALL
    reasons = [each["error"] for each in read(output)["rows"]]
    assert reasons == [None, None, "out of memory at batch 4; try --batch-size 2", None]
    printed = capsys.readouterr()
    assert "failed: tome r=1: out of" in printed.out and "tome r=1 failed: out of" in printed.err
    assert pretend([*words, "--resume"]) == [1]  # what failed is tried again


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt(), 130), (Stopped(), 143)])
def test_an_interrupt_keeps_what_is_finished(fast, tmp_path, capsys, stop, status):
    def fail(r):
        if r == 2:
            raise stop

    output = tmp_path / "s.json"
    assert run(lambda: bool(pretend([*fast, "--output", output], fail)), PROGRAM) == status
    assert [each["args"].get("r") for each in read(output)["rows"]] == [None, None, 1]
    assert "3 finished settings are kept; --resume continues" in capsys.readouterr().err


def test_a_resumed_run_gives_what_a_whole_one_does(fast, tmp_path, capsys):
    """It was killed; then settings and pictures must be the same, and rows are found again."""
    whole, output = tmp_path / "whole.json", tmp_path / "s.json"
    fast = [*fast, "--levels", "0.9"]
    assert main([*fast, "--output", str(whole)]) == 0
    words = [*fast, "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "hvit_jax", "compare", *words],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DEFAULT_MATMUL_PRECISION": "highest"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not output.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    finished = read(output)["rows"]
    assert 1 <= len(finished) <= 3
    assert main([*words, "--resume"]) == 0
    kept = ("name", "method", "args", "resolution", "cost", "scores", "draws")
    rows = [[{name: each.get(name) for name in kept} for each in read(file)["rows"]]
            for file in (whole, output)]  # fmt: skip
    assert rows[0] == rows[1]
    capsys.readouterr()
    assert main([*words, "--resume", "-b", "5"]) == 2
    errors = capsys.readouterr().err
    written = f"{output} was written with --batch-size 4, now 5; choose another --output\n"
    assert errors.endswith(written) and errors.count("\n") == 1
    assert main([*words, "--resume", "--unroll"]) == 2
    assert "was written without unroll, now with; choose" in capsys.readouterr().err
    check_verification(output, capsys)


def check_verification(path, capsys):
    """Every score of a file is found again; a number that was changed is named."""
    assert main(["--verify", str(path), "-j", "0"]) == 0
    assert "verified: the scores of 3 settings on 10 pictures\n" in capsys.readouterr().out
    content = read(path)
    content["rows"] = [content["rows"][2]]
    content["rows"][0]["scores"]["top1"]["value"] += 10
    content["rows"][0]["cost"] = 0.5
    path.write_text(json.dumps(content))
    assert main(["--verify", str(path), "-j", "0"]) == 1
    printed = capsys.readouterr().out
    assert "differs: tome r=1: value of top1 was " in printed
    assert "differs: tome r=1: cost was 0.5 and is 0.874365" in printed
    assert printed.count("differs: ") == 2
    assert main(["--verify", str(path), "--output", "o.json"]) == 2
    assert "--verify writes nothing; leave out --output" in capsys.readouterr().err
    path.write_text(json.dumps({"rows": [{}], "config": {}}))
    assert main(["--verify", str(path)]) == 2
    assert f"{path} holds no comparison, as hvit compare" in capsys.readouterr().err


def test_other_content_is_noticed(fast, inputs, tmp_path, capsys):
    folder, output = tmp_path / "pictures", tmp_path / "s.json"
    shutil.copytree(inputs[0], folder)
    words = [str(folder), *fast[1:]]
    pretend([*words, "--output", output])
    content = output.read_text()
    assert read(output)["sampling"] == "at even distances"
    capsys.readouterr()
    one = next(folder.rglob("*.png"))
    one.write_bytes(one.read_bytes() + b"\0")
    assert main([*words, "--output", str(output), "--resume"]) == 2
    errors = capsys.readouterr().err
    assert f"s.json was written with other pictures in {folder} than now; choose" in errors
    assert errors.count("\n") == 1 and output.read_text() == content


def test_budgets_are_measured_and_eight_devices_give_what_one_does(inputs, tmp_path, capsys):
    files = [tmp_path / "one.json", tmp_path / "eight.json"]
    words = [*inputs, "--methods", "ats", "-j", "0", "--seconds", "0.001", "--max-drop", "100"]
    found = compare(configured(*words, "-b", "8", "--output", files[0]), settings=ATS)
    assert [each.method for each in found.rows] == ["dense", "ats"]
    assert "images/s" in capsys.readouterr().out
    # 9 is no multiple of 8, nor are 10 pictures.
    done = run_python(COMPARE_ATS, *words, "-b", "9", "--output", files[1], **EIGHT)
    assert done.returncode == 0, done.stderr
    assert "on 8" in done.stdout and "8 x cpu (" in done.stderr
    one, eight = map(read, files)
    assert (one["devices"], eight["devices"]) == (1, 8)
    assert eight["data_sha256"] == one["data_sha256"]
    for mine, other in zip(one["rows"], eight["rows"], strict=True):
        assert (mine["devices"], other["devices"], other["batch"]) == (1, 8, 16)
        assert other["error"] is None and other["throughput"] > 0
        for name in ("args", "report", "draws"):
            assert other[name] == mine[name]
        assert other["scores"]["top1"] == mine["scores"]["top1"]
    assert len(one["rows"][1]["args"]["max_tokens"]) == 2
    assert "ats_images_over_budget" in one["rows"][1]["report"]
    assert summary(Trial(**eight["rows"][1])).endswith("x dense on 8 devices")
    assert main([*words, "-b", "9", "--output", str(files[1]), "--resume"]) == 2
    assert "with devices 8, now 1; " in capsys.readouterr().err


def test_nothing_reaches_the_target(fast, capsys):
    """The nearest is named, and the exit status tells."""
    assert pretend([*fast, "--target-speedup", "900"]) == ALL
    printed = capsys.readouterr().out
    assert "nothing reaches 900 x dense; nearest: tome r=2" in printed
    assert "--method tome --r 2" in printed


def test_logits_that_are_not_finite(tmp_path, inputs, fast, capsys):
    parameters = init_parameters(CONFIG, 0)
    for part, name in (("ln", "scale"), ("head", "kernel")):  # Finite, but not their product.
        parameters[part][name] = np.full_like(parameters[part][name], 1e30)
    save_checkpoint(tmp_path / "nan", parameters, Description(CONFIG))
    words = [str(tmp_path / "nan") if word == inputs[2] else word for word in fast]
    assert main(words) == 2
    assert "the logits of 10 pictures are not finite numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--target-speedup", "2", "--max-drop", "1"],
            "give --target-speedup X or --max-drop POINTS, not both",
        ),
        (["--target-speedup", "1"], "--target-speedup must be above 1 and at most 1000, got 1"),
        (["--target-speedup", "nan"], "--target-speedup must be a number, got 'nan'"),
        (["--max-drop", "-1"], "--max-drop must be at least 0 and at most 100, got -1"),
        (["--methods", "tome,tom"], "unknown method 'tom', did you mean 'tome'?"),
        (["--methods", "nope"], "(known: dense, hourglass"),
        (["--methods", "tome+tom"], "unknown method 'tom', did you mean 'tome'?"),
        (["--methods", "tome+act"], "act cannot be chained: "),
        (["--methods", "dense"], "beside dense, which is always tried"),
        (["--processes", "2"], "unknown option --processes"),
        (["--method", "tome"], "unknown option --method, did you mean --methods?"),
        (["--methods", ","], "--methods names no method"),
        (["--pictures", "1"], "--pictures must be at least 2, got 1"),
        (["-b", "0"], "--batch-size must be at least 1"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--resume"], "--resume needs --output FILE.json"),
        (["--output", "s.txt"], "--output takes a name that ends in .json, .csv, .html, got s.txt"),
        (["--resume", "--output", "s.csv"], "--resume needs --output FILE.json"),
        (["--levels", "1.5"], "--levels must be above 0 and at most 1, got 1.5"),
        (["--levels", ","], "--levels needs at least one number"),
        (["--levels", "0.6,0.8,0.6"], "--levels names a share twice"),
        (["--window", "16"], "--window is for models that make maps"),
        (["--truth", "x"], "--truth is for models that make maps"),
        (["--unlabelled", "--labels", "x.txt"], "--unlabelled leaves aside what --labels"),
        (["-r", "17,24"], "not a multiple of the patch size"),
        (["--depth", "3"], "unknown option --depth"),
    ],
)
def test_mistakes_are_one_line(fast, capsys, arguments, message):
    assert main([*fast, *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors


def test_the_method_that_a_checkpoint_was_trained_with_is_named(fast, tmp_path, capsys):
    evit = hvit_jax.make_reducer("evit", drop_locations=(1,))
    trained = make_checkpoint(tmp_path / "checkpoint", trained=evit)
    line = "trained with evit; changes are counted from the dense model\n"
    for words, told in (([fast[0], "--checkpoint", trained, *fast[3:]], True), (fast, False)):
        assert pretend(words) == ALL
        assert (line in capsys.readouterr().err) is told


def test_a_launcher_of_several_is_told_that_one_process_is_enough(fast, monkeypatch, capsys):
    for name, value in slurm_task(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert main(fast) == 2
    errors = capsys.readouterr().err
    assert "start it once, without srun or mpirun" in errors and errors.count("\n") == 1


def test_files_and_pictures_are_checked_before_the_work(fast, inputs, tmp_path, capsys):
    taken = tmp_path / "s.json"
    taken.write_text("mine")
    for words, message in [
        ([*fast, "--output", str(taken)], "exists already; --resume continues it"),
        ([*fast, "--output", str(taken), "--resume"], "is not JSON"),
        (["--checkpoint", inputs[2]], "give both DATA and --checkpoint DIR, or neither"),
        (["--methods", "tome", "evit"], "lists are written with commas: tome,evit (a folder of"),
        (["--methods", "tome", "pool+evit"], "written with commas: tome,pool+evit (a folder of"),
    ]:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert taken.read_text() == "mine"
    part = take_evenly(open_source(inputs[0]), 1000)
    with pytest.raises(hvit_jax.InputError, match="more than 9e-06; use --pictures 7"):
        options = {"workers": 0, "messages": Console(stderr=True), "most_bytes": 9000}
        load_sample(part, (16, 24), batch_size=4, **options)
    (tmp_path / "data" / "c0").mkdir(parents=True)
    for index in range(1, 7):
        (tmp_path / "data" / f"c{index}").mkdir()
    for name in ("broken", "damaged"):
        (tmp_path / "data" / "c0" / f"{name}.png").write_bytes(b"no picture")
    assert main([str(tmp_path / "data"), *fast[1:]]) == 2
    # The picture's fault is not said to be the dense model's.
    assert "hvit compare: picture c0/broken.png" in capsys.readouterr().err
