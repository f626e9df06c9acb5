"""`profile.py`: what it measures, writes, continues with, and refuses."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import pytest

from hvit_jax import demo
from hvit_jax.checkpoint import checkpoint_sha256, read_description
from hvit_jax.commands.flags import parse
from hvit_jax.commands.profile import main
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import abstract_parameters, count_parameters
from hvit_jax.profiling import ProfileConfig, device, plot, profile, rivals, torch_vit
from hvit_jax.profiling.bench import Profiler
from hvit_jax.profiling.results import Measurement
from hvit_jax.published import describe_configuration, published_rows
from hvit_jax.reducers import make_reducer
from tests.evaluation_setup import make_checkpoint

ROOT = Path(__file__).parents[2]
DEMO = str(demo.checkpoint_dir())
FAST = ["--checkpoint", DEMO, "-b", "2", "--seconds", "0.01"]


class Quick(Profiler):
    """Measures nothing; `fail` may raise instead."""

    def __init__(self, config, fail=lambda batch: None):
        super().__init__(config, peak=1e12)
        self.fail, self.measured = fail, []

    def measure(self, case):
        self.problems = []
        self.measured.append(case.batch)
        self.fail(case.batch)
        figures = {"throughput": 8.0, "throughput_range": [8.0, 8.0], "compile_seconds": 0.0}
        return replace(case.row("float32"), **figures)


def configured(*words):
    return parse(ProfileConfig, [*FAST, *words], program="hvit profile", description="")


def measure(*words):
    """Profile the demo for real, but for the device's fastest matrix product."""
    config = configured(*words)
    return profile(config, bench=Profiler(config, peak=1e12))


def pretend(*words, **options):
    config = configured(*words)
    return profile(config, bench=Quick(config, **options))


def read(path):
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_sixteen_bits_are_slow_on_a_cpu(capsys):
    for words, count in ((["--dtype", "bfloat16"], 1), ([], 0)):
        pretend(*words)
        assert capsys.readouterr().err.count("bfloat16 is slower than float32 on a CPU\n") == count
    pretend("--dtype", "bfloat16", "--gflops-only")
    assert "slower" not in capsys.readouterr().err


def test_a_row_has_every_figure(tmp_path, capsys):
    output = tmp_path / "rows.json"
    measure("--method", "hourglass", "--output", str(output))
    content = read(output)
    dense, row = content["rows"]
    assert (dense["method"], dense["speedup_over_dense"]) == ("dense", 1.0)
    config = read_description(DEMO).config
    assert (row["method"], row["model"], row["resolution"]) == ("hourglass", "custom", [56, 56])
    assert (row["batch"], row["dtype"], row["error"]) == (2, "float32", None)
    assert row["args"]["num_clusters"] == 49
    assert row["tokens"] == [197, 197, 50, 50, 50, 50]
    assert row["gflops"] == pytest.approx(0.045, abs=5e-4)
    assert row["parameters"] == count_parameters(abstract_parameters(config))
    low, high = row["throughput_range"]
    assert 0 < low <= row["throughput"] <= high
    assert 0 < row["latency_ms"] <= row["latency_p95_ms"]
    operations = 2e9 * row["gflops"] * row["throughput"]
    assert row["tflops_per_second"] * 1e12 == pytest.approx(operations)
    assert row["peak_share"] * 1e12 == pytest.approx(operations)
    assert row["peak_memory_bytes"] > 4 * row["parameters"]
    assert row["compile_seconds"] > 0
    # The tests' own cache may have it; that of the command is tried in processes below.
    assert isinstance(row["compile_from_cache"], bool)
    assert row["speedup_over_dense"] > 0
    assert row["speedup_over_rival"] is row["rival"] is row["published"] is None
    assert content["device"] == jax.devices()[0].device_kind
    assert content["config"]["compute"]["dtype"] == "float32"
    printed = capsys.readouterr().out
    (first, *others) = [line.split("│") for line in printed.splitlines() if "custom 56" in line]
    assert [cell.strip() for cell in first[2:5]] == ["dense", "2", "0.083"]
    assert [cell.strip() for cell in others[0][2:5]] == ["hourglass", "2", "0.045"]
    assert "cluster_location=2" in printed and "num_clusters=49" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())


@pytest.fixture(scope="module")
def all_rows(tmp_path_factory):
    output = tmp_path_factory.mktemp("rows") / "rows.json"
    assert main(["--rows", "all", "--gflops-only", "--output", str(output)]) == 0
    return read(output)["rows"]


def test_gflops_of_all_published_rows(all_rows):
    assert len(all_rows) == len(published_rows())
    for row, published in zip(all_rows, published_rows(), strict=True):
        assert row["published"]["gflops"] == published["published"]["gflops"]
        assert row["throughput"] is None
        if "gflops" in published:
            assert row["gflops"] == pytest.approx(published["gflops"], abs=0.01)
        else:
            # Budgets of 15 % more than the published GFLOPs imply.
            assert 1 < row["gflops"] / published["published"]["gflops"] < 1.06


@pytest.mark.parametrize("selection", ["tome", "vit_h14"])
def test_some_published_rows(selection, capsys):
    found = profile(ProfileConfig(rows=selection, gflops_only=True))
    rows = [row for row in published_rows() if selection in (row["method"], row["model"])]
    assert [(row.method, row.model) for row in found] == [
        (row["method"], row["model"]) for row in rows
    ]
    printed = capsys.readouterr().out
    assert all(f"│ {row['method']} " in printed for row in rows)


def test_published_speedup_follows_from_throughputs(all_rows):
    speedups = {
        (row["model"], row["published"]["throughput"]): row["published"]["speedup"]
        for row in all_rows
    }
    assert speedups["vit_l16", 14.7] == 1
    assert speedups["vit_l16", 29.7] == pytest.approx(29.7 / 14.7)


def test_dense_models_are_shown_beside_the_published_rows_of_a_method():
    rows = profile(ProfileConfig(rows="tome"), bench=Quick(ProfileConfig(rows="tome")))
    names = [(row.method, row.model) for row in rows]
    tome = [row["model"] for row in published_rows() if row["method"] == "tome"]
    assert [name for name in names if name[0] == "tome"] == [("tome", name) for name in tome]
    assert [name for name in names if name[0] == "dense"] == [
        ("dense", name) for name in dict.fromkeys(tome)
    ]


def test_pytorch_runs_eagerly_and_compiled():
    """On a CPU, on the same weights; what compiled is takes a minute, and `slow` tests it."""
    pytest.importorskip("torch")
    profiler = Profiler(configured(), peak=1e12)
    sizes = read_description(demo.checkpoint_dir()).config
    program, weights = profiler._dense(sizes, 2), profiler._weights(sizes)
    model = torch_vit.torch_model(sizes, weights)
    ways = list(torch_vit.torch_rivals(model, "PyTorch", program.images, "float32"))
    assert [way.name for way in ways] == ["PyTorch float32, eager", "PyTorch float32, compiled"]
    options = {"seconds": 0.01, "latency": True}
    best, problems = rivals.fastest_rival(ways[:1], program(), "float32", **options)
    assert best == ways[0] and problems == []


@pytest.mark.slow
def test_pytorch_is_timed_beside_ours_on_the_same_weights(tmp_path):
    output = tmp_path / "rows.json"
    measure("--method", "evit", "--against", "torch", "--output", str(output))
    row = read(output)["rows"][-1]
    assert row["speedup_over_rival"] > 0
    assert row["rival"] in ("PyTorch float32, eager", "PyTorch float32, compiled")
    assert row["rival_latency_ms"] > 0
    assert "torch" in read(output)["versions"]


def test_the_exported_model_is_timed_beside_ours(tmp_path):
    pytest.importorskip("onnxruntime")
    output = tmp_path / "rows.json"
    measure("--method", "evit", "--against", "onnxruntime", "--output", str(output))
    row = read(output)["rows"][-1]
    assert row["rival"] == "ONNX Runtime float32"
    assert row["speedup_over_rival"] > 0 and row["rival_latency_ms"] > 0
    assert "onnxruntime" in read(output)["versions"]


@dataclass(frozen=True)
class Timed(device.Work):
    """Takes some seconds, as it says itself."""

    takes: float

    def seconds(self, calls):
        return self.takes


def rival(name, batch=1.0, single=1.0, logits=(1.0, -1.0)):
    """A way to run PyTorch's model that takes some seconds, or fails where it has no logits."""
    torch = pytest.importorskip("torch")

    def start():
        return torch.tensor([logits])

    works = (Timed(start, lambda result: None, takes) for takes in (batch, single))
    return rivals.Rival(f"PyTorch {name}", *works)


def fastest(*ways, latency=False):
    expected = jax.numpy.array([[1.0, -1.0]])
    return rivals.fastest_rival(ways, expected, "float32", seconds=0.01, latency=latency)


def test_pytorch_runs_batch_and_single_image_each_its_fastest_way():
    ways = rival("eager", 4.0, 1.0), rival("compiled", 1.0, 4.0)
    best, problems = fastest(*ways, latency=True)
    assert (best.name, best.work, best.single) == (ways[1].name, ways[1].work, ways[0].single)
    assert problems == []
    assert fastest(*ways)[0] is ways[1]


def test_ways_of_pytorch_that_do_not_run_are_left_out_but_not_the_plain_one():
    eager, problem = rival("eager"), "PyTorch compiled does not run: could not determine the shape"
    best, (told,) = fastest(eager, rival("compiled", logits=None))
    assert best is eager and told.startswith(problem[:30])
    with pytest.raises(RuntimeError):
        fastest(rival("eager", logits=None))
    with pytest.raises(RuntimeError, match="^PyTorch eager does not run: too many dimensions"):
        fastest(rival("eager", logits="words"))


def test_pytorch_with_other_logits_is_refused():
    fastest(rival("eager", logits=(1.0005, -1.0)))
    with pytest.raises(InputError, match="logits of PyTorch eager differ by 0.0071 standard"):
        fastest(rival("eager", logits=(1.01, -1.0)))


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory at batch 2"),
        (MemoryError(), "out of memory at batch 2"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_failures_of_pytorch_are_rows_too(capsys, error, reason):
    def fails(batch):
        raise error

    (row,) = pretend("--against", "torch", fail=fails)
    assert row.error.startswith(reason)
    assert f"failed: {reason}" in capsys.readouterr().err


def test_failed_rows_do_not_stop_the_others_and_are_tried_again(tmp_path, capsys):
    output = tmp_path / "rows.json"
    words = ["--sweep", "batch=1,2,3", "--output", str(output)]

    def fails_at_two(batch):
        if batch == 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")

    pretend(*words, fail=fails_at_two)
    errors = [row["error"] for row in read(output)["rows"]]
    assert errors[::2] == [None, None]
    assert errors[1] == "out of memory at batch 2; try --batch-size 1"
    assert errors[1] in capsys.readouterr().err
    config = configured(*words, "--resume")
    bench = Quick(config)
    profile(config, bench=bench)
    assert bench.measured == [2]
    assert sorted(row["batch"] for row in read(output)["rows"]) == [1, 2, 3]


def test_rows_that_fail_give_status_1(capsys):
    assert main([*FAST, "-b", "100000000", "--no-dense", "--no-latency"]) == 1
    failed = "failed: custom 56, dense: out of memory at batch 100000000; try --batch-size 50000000"
    assert failed in capsys.readouterr().out


def test_an_interrupted_run_keeps_finished_rows(tmp_path, capsys):
    output = tmp_path / "rows.json"

    def interrupted(batch):
        if batch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted; finished rows are kept"):
        pretend("--sweep", "batch=1,2", "--output", str(output), fail=interrupted)
    assert [row["batch"] for row in read(output)["rows"]] == [1]
    assert "│ dense  │ 1     │" in capsys.readouterr().out


def test_tables(tmp_path):
    files = [tmp_path / name for name in ("rows.csv", "rows.md")]
    flags = [word for file in files for word in ("--output", str(file))]
    pretend("--sweep", "batch=1,2", *flags)
    rows = list(csv.DictReader(files[0].open()))
    assert [row["batch"] for row in rows] == ["1", "2"]
    assert json.loads(rows[0]["tokens"]) == [197] * 6
    assert files[1].read_text().startswith("| model | method | batch | GFLOPs |")
    assert len(files[1].read_text().splitlines()) == 4


def test_plot_draws_what_has_both_figures(tmp_path):
    def row(method, throughput):
        return Measurement(
            model="vit_l16", method=method, throughput=throughput, args={}, resolution=[512, 512],
            batch=8, dtype="float32", gflops=1.0, tokens=[],
        )  # fmt: skip

    rows = [row("dense", 10.0), row("tome", 20.0), row("ats", 5.0)]
    rows += [row("act", None), row("evit", 1.0)]
    top1 = {"dense": 88.1, "tome": 88.0, "ats": 84.0, "act": 80.0, "evit": None}
    path = tmp_path / "plot.png"
    plot.plot(rows, path, lambda row: top1[row.method], "published")
    assert path.read_bytes().startswith(b"\x89PNG")
    points = [(each.throughput, top1[each.method]) for each in rows[:3]]
    assert plot.pareto_front(points) == [(20.0, 88.0), (10.0, 88.1)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Results of the demo's dense model and of EViT, as `eval.py --output` writes them."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = read_description(DEMO).config
    for method, top1 in (("dense", 90.0), ("evit", 89.0)):
        results = {
            **describe_configuration(config, make_reducer(method).resolve(config)),
            "dtype": "float32", "batch_size": 64, "data": "D", "checkpoint": DEMO,
            "top1": top1, "partial": False, "data_sha256": "1",
            "checkpoint_sha256": checkpoint_sha256(DEMO),
        }  # fmt: skip
        (folder / f"{method}.json").write_text(json.dumps(results))
    return folder


def test_measured_accuracies_are_drawn_and_rows_without_are_named(evaluated, tmp_path, capsys):
    files = [evaluated / f"{each}.json" for each in ("dense", "evit")]
    path, output = tmp_path / "front.png", tmp_path / "rows.json"
    pretend("--method", "tome", "--output", str(output))
    capsys.readouterr()
    more = ["--output", str(output), "--resume", "--method", "evit", "--plot", str(path)]
    rows = pretend(*more, "--accuracy", ",".join(map(str, files)))
    measured = plot.read_accuracies(files, None)
    figure = plot.draw_models(rows, lambda row: measured[row.configuration], "measured")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn == {"dense": [[8, 90]], "evit": [[8, 89]], "Pareto front": [[8, 90]]}
    assert path.read_bytes().startswith(b"\x89PNG")
    errors = capsys.readouterr().err
    assert "not drawn, since --accuracy has no results file for it: custom tome r=" in errors
    assert errors.count("not drawn") == 1


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "holds no results"),
        ({"partial": True}, "did not finish"),
        (
            {"model": "vit_b16"},
            "none of the --accuracy files is for a configuration that is measured here",
        ),
        ({"args": {"keep_rate": 0.1}}, "none of the --accuracy files is for a configuration"),
        ({"checkpoint_sha256": "0"}, "evit.json is for another checkpoint: "),
        ({}, "evit.json are for the same configuration"),
        ({"method": "dense", "data_sha256": "2"}, "were scored on different pictures"),
        ({"method": "dense", "classified_by": "x"}, "by different means: x, a head"),
    ],
)
def test_results_that_cannot_be_drawn_are_refused(evaluated, tmp_path, capsys, entries, message):
    file, files = tmp_path / "evit.json", [tmp_path / "evit.json"]
    content = json.loads((evaluated / "evit.json").read_text())
    if isinstance(entries, dict):
        file.write_text(json.dumps({**content, **entries}))
    elif entries is not None:
        file.write_text(entries)
    if entries == {} or {"data_sha256", "classified_by"} & set(entries or ""):
        files.append(evaluated / "evit.json")
    words = ["--plot", str(tmp_path / "p.png"), "--accuracy", ",".join(map(str, files))]
    assert main([*FAST, "--method", "evit", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_one_device_of_several_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    pretend()
    assert "only one of the 8 devices is measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name", "told"),
    [
        ((), "evit", True),
        (("--method", "dense"), "dense", False),
        (("--method", "tome"), "tome", False),
    ],
)
def test_a_checkpoint_trained_with_a_method_is_measured_with_it(
    tmp_path, capsys, words, name, told
):
    evit = make_reducer("evit", drop_locations=(1,))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", trained=evit)
    rows = pretend("--checkpoint", str(checkpoint), *words)
    assert [row.method for row in rows] == list(dict.fromkeys(["dense", name]))
    line = "trained with evit drop_locations=1, which is used; --method dense runs the dense model"
    assert (line in capsys.readouterr().err) is told


def test_trace(tmp_path):
    folder = tmp_path / "trace"
    measure("--no-latency", "--trace", str(folder))
    assert list(folder.rglob("*.xplane.pb"))


def test_method_options_from_calibrate(tmp_path):
    file = tmp_path / "ats.json"
    file.write_text(json.dumps({"method": "ats", "args": {"max_tokens": 60}, "measured": {}}))
    rows = pretend("--method", "ats", "--method-args", str(file))
    assert rows[-1].tokens[-1] == 60


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows", "some"], "unknown choice of rows 'some'"),
        (["--rows", "all", "--model", "vit_b16"], "leave out --model"),
        (["--rows", "all", "--method", "tome"], "leave out --method"),
        (["--model", "vit_x"], "unknown model 'vit_x'"),
        (["--model", "vit_b16", "--checkpoint", "x"], "--model NAME or --checkpoint DIR, not both"),
        (["--method", "hourglass", "-l", "12"], "cluster_location=12"),
        (["-b", "0"], "--batch-size must be at least 1, got 0"),
        (["-r", "100"], "--resolution: resolution 100 is not a multiple"),
        (["--sweep", "batch=1,x"], "--sweep takes batch=N,N"),
        (["--sweep", "dtype=1"], "--sweep takes batch=N,N"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (
            ["--output", "rows.txt"],
            "--output takes a name that ends in .json, .csv, .md, got",
        ),
        (["--output", "missing/rows.json"], "there is no folder missing"),
        (["--resume"], "--resume needs --output FILE.json"),
        (["--plot", "plot.gif"], "--plot takes a name that ends in .png, .jpg, .jpeg, .svg, .pdf"),
        (["--plot", "missing/plot.png"], "there is no folder missing"),
        (["--plot", "plot.png", "-r", "64"], "this configuration has none"),
        (["--accuracy", "r.json"], "--accuracy goes with --plot FILE.png"),
        (["--trace", "missing/trace"], "there is no folder missing"),
        (["--gflops-only", "--trace", "t"], "--gflops-only measures nothing; leave out --trace"),
        (["--dtype", "float64"], "--dtype must be one of float32, bfloat16, float8: 'float64'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ('{"rows": [{}]}', "is not a report of this command"),
    ],
)
def test_damaged_reports_are_refused(tmp_path, content, message, capsys):
    output = tmp_path / "rows.json"
    output.write_text(content)
    assert main([*FAST, "--output", str(output), "--resume"]) == 2
    assert message in capsys.readouterr().err


def test_missing_libraries_name_their_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*FAST, "--plot", "plot.png"]) == 2
    assert "pip install 'hvit-jax[plot]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main([*FAST, "--against", "torch"]) == 2
    assert "torch" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main([*FAST, "--against", "onnxruntime"]) == 2
    assert "needs ONNX: pip install 'hvit-jax[onnx]'" in capsys.readouterr().err


def test_other_settings_are_refused(tmp_path, capsys):
    output = tmp_path / "rows.json"
    words = ["--output", str(output)]
    pretend(*words)
    assert main([*FAST, *words]) == 2
    assert "exists already; --resume continues it" in capsys.readouterr().err
    assert main([*FAST, *words, "--resume", "--attention", "xla"]) == 2
    named = f"{output} was written with --attention auto, now xla; choose another --output\n"
    assert capsys.readouterr().err == f"hvit profile: {named}"
    assert main([*FAST, *words, "--resume", "--gelu", "tanh"]) == 2
    assert "was written with --gelu auto, now tanh; choose" in capsys.readouterr().err
    content = read(output)
    content["versions"]["jax"] = "0.1"
    output.write_text(json.dumps(content))
    assert main([*FAST, *words, "--resume"]) == 2
    assert f"written with jax 0.1, now {jax.__version__}; choose" in capsys.readouterr().err


def test_another_checkpoint_under_the_same_name_is_refused(tmp_path, capsys):
    output, checkpoint = tmp_path / "rows.json", tmp_path / "checkpoint"
    shutil.copytree(DEMO, checkpoint)
    command = ["--gflops-only", "--output", str(output), "--checkpoint"]
    assert main([*command, str(checkpoint)]) == 0
    content = read(output)
    assert content["checkpoint_sha256"] == checkpoint_sha256(checkpoint)
    assert (content["seed"], content["devices"]) == (0, 1)
    assert content["versions"].keys() >= {"jax", "jaxlib", "flax", "hvit_jax", "python"}
    moved = checkpoint.rename(tmp_path / "moved")
    assert main([*command, str(moved), "--resume"]) == 0
    moved.rename(checkpoint)
    description = json.loads((checkpoint / "model.json").read_text())
    description["source"] = {"file": "another"}
    (checkpoint / "model.json").write_text(json.dumps(description))
    capsys.readouterr()
    assert main([*command, str(checkpoint), "--resume"]) == 2
    message = f"written with another checkpoint in {checkpoint} than now; choose another --output"
    assert message in capsys.readouterr().err


def test_turns_are_medians_of_one_call():
    order = []
    works = [
        device.Work(lambda name=name: order.append(name), lambda result: None) for name in "ab"
    ]
    times = device.time_in_turns(works, seconds=1e-9, rounds=3)
    assert [len(rounds) for rounds in times] == [3, 3]
    assert "".join(order) == "ab" + "ab" + "ababab"
    rates, (ratios,) = device.rates_and_ratios([[1.0] * 3, [2.0, 9.0, 4.0]], batch=6)
    assert (statistics.median(rates), statistics.median(ratios)) == (6, 4)


def test_the_latest_result_is_freed_before_the_next_is_made():
    class Weights:
        """Something large."""

    made, alive = [], weakref.WeakSet()

    def make(key):
        made.append((key, len(alive)))
        alive.add(weights := Weights())
        return weights

    latest = device.Latest(make)
    for key in "aab":
        latest(key)
    assert made == [("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    "code",
    [
        "import cProfile, profile; assert profile.Profile; assert cProfile.Profile",
        "import profile, cProfile; assert profile.__file__.replace('profile', 'cProfile') "
        "== cProfile.__file__",
        "import torch._dynamo",
    ],
)
def test_the_standard_module_profile_is_found_from_the_root(code):
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_profile_runs_as_a_script_and_under_the_standard_profiler():
    for command in (["profile.py"], ["-m", "cProfile", "profile.py"]):
        done = subprocess.run(
            [sys.executable, *command, "--gflops-only"], cwd=ROOT, capture_output=True, text=True
        )
        assert "│ vit_b16 384 │ dense  │ 8     │" in done.stdout, done.stderr
