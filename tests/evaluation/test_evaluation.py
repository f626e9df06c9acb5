"""What an evaluation computes, adds up, prints and writes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import hvit_jax
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.eval import main
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.distributed.placement import place
from hvit_jax.evaluation import EvalConfig
from hvit_jax.evaluation import evaluate as evaluate_config
from hvit_jax.evaluation.results import print_results, scores
from hvit_jax.evaluation.step import PADDING, UNREADABLE, compare, compile_step
from hvit_jax.evaluation.tally import Rows, Tally, Totals
from hvit_jax.fields import as_json
from tests.evaluation_setup import evaluate, make_checkpoint, make_pictures, results_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def api_logits(checkpoint, pictures, method="dense", **options):
    source = read_folder(pictures)
    model = hvit_jax.load(checkpoint, method, **options)
    shape = model.config.image_shape
    pixels = [resize_and_crop(source.open(index), shape) for index in range(len(source))]
    return np.asarray(hvit_jax.jit_model(model)(normalize(np.stack(pixels)))), source


def test_compare_by_hand():
    logits = jnp.array([[2.0, 1, 0, -1, -2, -3, -4], [0, 0, 0, 0, 0, 0, 9], [1, 2, 3, 4, 5, 6, 7]])
    outputs = compare(logits, jnp.array([4, 0, 1]), {})
    assert outputs.top1.tolist() == [0, 6, 6]
    assert outputs.correct.tolist() == [False, False, False]
    assert outputs.correct_top5.tolist() == [True, True, False]
    losses = np.log(np.exp(np.asarray(logits)).sum(1)) - np.asarray(logits)[[0, 1, 2], [4, 0, 1]]
    np.testing.assert_allclose(outputs.loss, losses, rtol=1e-6)


def test_compare_with_few_classes_and_broken_logits():
    outputs = compare(jnp.array([[1.0, 2], [jnp.nan, jnp.nan]]), jnp.array([0, 0]), {})
    assert outputs.correct.tolist() == [False, False]
    assert outputs.correct_top5.tolist() == [True, False]
    assert outputs.finite.tolist() == [True, False]


def test_compare_with_several_right_labels():
    logits = jnp.array([[2.0, 1, 0], [0, 0, 9], [1, 2, 3]])
    outputs = compare(logits, jnp.array([[1, 0], [0, -1], [1, 0]]), {})
    assert outputs.correct.tolist() == [True, False, False]
    assert outputs.correct_top5.tolist() == [True, True, True]
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = -np.log([shares[0, 0] + shares[0, 1], shares[1, 0], shares[2, 0] + shares[2, 1]])
    np.testing.assert_allclose(outputs.loss, wanted, rtol=1e-5)


def test_compare_among_some_outputs():
    logits = jnp.array([[2.0, 1, 0, 3], [0, 0, 9, 1]])
    outputs = compare(logits, jnp.array([1, 1]), {}, outputs=(1, 3))
    assert outputs.top1.tolist() == [3, 3] and outputs.correct.tolist() == [False, False]
    assert outputs.correct_top5.tolist() == [True, True]
    losses = [np.log(np.exp(1) + np.exp(3)) - 1, np.log(1 + np.exp(1))]
    np.testing.assert_allclose(outputs.loss, losses, rtol=1e-6)
    np.testing.assert_array_equal(outputs.logits, logits)
    assert compare(logits, jnp.array([0, 2]), {}, outputs=(0, 2)).correct.tolist() == [True, True]


def test_tally_ignores_padding_and_unreadable_rows():
    tally = Tally(keep_logits=True)
    logits = jnp.array([[3.0, 0], [3, 0], [0, 3], [0, 3]])
    report = {"over_budget": jnp.array([1.0, 2, 4, 8])}
    for labels, problems in (
        ((0, UNREADABLE, 1, 0), ["picture x: broken"]),
        ((0, PADDING, PADDING, PADDING), []),
    ):
        outputs = jax.device_get(compare(logits, jnp.array(labels), report))
        tally.add(outputs, problems, 0.0)
    totals = tally.totals
    assert (totals.images, totals.correct, totals.correct_top5) == (4, 3, 4)
    assert (totals.unreadable, totals.pictures) == (1, 5)
    assert totals.report == {"over_budget": 14.0}
    assert totals.loss == pytest.approx(3 * np.log1p(np.exp(-3)) + np.log1p(np.exp(3)), rel=1e-6)
    assert tally.skipped == ["picture x: broken"]
    assert [rows.indices.tolist() for rows in tally.rows] == [[0, 2, 3], [4]]
    assert tally.rows[0].top1.tolist() == [0, 1, 1]
    assert tally.rows[1].logits.tolist() == [[3, 0]]


def test_speed_counts_from_the_first_batch_in_hand():
    several = Totals(images=100, seconds=10.0)
    assert several.images_per_second == 10.0
    assert Totals().images_per_second is None
    assert Totals().percent(0) is None


def test_nothing_compiles_after_the_step(checkpoint, pictures, caplog):
    with jax.log_compiles():
        assert evaluate(pictures, checkpoint, "-b", "3") == 0
    compiled = [text for text in caplog.messages if "Finished XLA compilation of" in text]
    assert sum("jit(step)" in text for text in compiled) == 1
    assert "jit(step)" in compiled[-1]


def test_step_takes_no_other_batch(checkpoint):
    step = compile_step(hvit_jax.load(checkpoint), 2, place())
    with pytest.raises(TypeError):
        step(np.zeros((1, 16, 24, 3), np.uint8), np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("words", "method", "options"),
    [
        ((), "dense", {}),
        (
            ("--method", "hourglass", "-l", "1", "-n", "1,2"),
            "hourglass",
            {"num_clusters": (1, 2)},
        ),
    ],
)
def test_predictions_are_the_logits_of_the_api(
    checkpoint, pictures, tmp_path, words, method, options
):
    results, found = results_of(pictures, checkpoint, tmp_path, "-b", "4", *words)
    if method == "hourglass":
        options = {**options, "cluster_location": 1}
    logits, source = api_logits(checkpoint, pictures, method, **options)
    assert found["logits"].dtype == np.float32
    np.testing.assert_allclose(found["logits"], logits, atol=2e-5)
    assert found["paths"].tolist() == list(source.paths) == sorted(source.paths)
    assert found["labels"].tolist() == list(source.labels)
    assert found["top1"].tolist() == logits.argmax(1).tolist()
    assert results["method"] == method
    assert results["top1"] == 100 * np.mean(logits.argmax(1) == source.labels)
    ranks = (logits > logits[np.arange(10), source.labels][:, None]).sum(1)
    assert results["top5"] == 100 * np.mean(ranks < 5)


def test_parity_predictions_of_a_converted_checkpoint(golden_checkpoint, goldens, tmp_path):
    classes = read_description(golden_checkpoint).config.num_classes
    if not classes:
        pytest.skip("this golden checkpoint has no head to evaluate")
    pictures = make_pictures(tmp_path / "data", classes=classes)
    logits, _ = api_logits(golden_checkpoint, pictures)
    _, found = results_of(pictures, golden_checkpoint, tmp_path, "-b", "8")
    np.testing.assert_allclose(found["logits"], logits, atol=1e-4, rtol=0)


def test_results_do_not_depend_on_batches_or_workers(checkpoint, pictures, tmp_path):
    runs = [
        results_of(pictures, checkpoint, tmp_path, "-b", size, workers=workers)
        for size, workers in ((1, 0), (7, 0), (4, 2))
    ]
    for results, predictions in runs[1:]:
        for name in ("top1", "top5", "images"):
            assert results[name] == runs[0][0][name]
        assert results["loss"] == pytest.approx(runs[0][0]["loss"], rel=1e-6)
        np.testing.assert_allclose(predictions["logits"], runs[0][1]["logits"], atol=2e-5)
        np.testing.assert_array_equal(predictions["paths"], runs[0][1]["paths"])


def test_results_file_and_table(checkpoint, pictures, tmp_path, capsys):
    results, _ = results_of(
        pictures, checkpoint, tmp_path, "-r", "32", "--dtype", "float8", "--unroll", "-b", "64"
    )
    assert results["resolution"] == [32, 32] and results["dtype"] == "float8"
    assert results["model"] == "custom" and results["args"] == {} and results["published"] is None
    assert results["images"] == 10 and results["batch_size"] == 10
    assert results["images_per_second"] > 0 and results["partial"] is False
    assert results["skipped"] == [] and results["report"] == {}
    assert results["gflops"] == pytest.approx(
        hvit_jax.count_flops(hvit_jax.load(checkpoint, resolution=32).config, hvit_jax.Reducer())
        / 1e9
    )
    assert results["checkpoint"] == str(checkpoint) and results["data"] == str(pictures)
    assert results["device"] == "cpu" and results["versions"]["jax"] == jax.__version__
    captured = capsys.readouterr()
    for text in ("top-1 (%)", "images/s", "GFLOPs", "dense, custom at 32x32, float8"):
        assert text in captured.out
    assert captured.err.count("float8 is slower than float32 on a CPU\n") == 1


def test_the_demo_runs_without_arguments(capsys):
    assert main(["-j", "0"]) == 0
    captured = capsys.readouterr()
    assert "1000 pictures, 10 classes" in captured.err and "top-1 (%)" in captured.out


def test_published_row_is_shown_beside(capsys):
    row = hvit_jax.published.published_rows()[3]
    results = dict.fromkeys(("top1", "top5", "loss", "images_per_second", "gflops"), 1.0)
    results |= {"images": 5, "partial": False, "published": row, "report": {"over_budget": 3.0}}
    results |= {
        "method": "tome",
        "model": "x",
        "resolution": [8, 8],
        "args": {"r": 1, "proportional_attention": True},
        "dtype": "f",
    }
    results |= {"device": "d", "skipped": [f"picture {n}: bad" for n in range(12)], "not_finite": 2}
    print_results(Console(width=100, highlight=False, markup=False), results)
    out = capsys.readouterr().out
    for text in ("published (V100", "87.2", "29.7", "179.0", "over budget", "picture 9: bad"):
        assert text in out
    assert "picture 10: bad" not in out and "and 2 more" in out and "2 pictures gave logits" in out


def test_what_has_no_number_is_null_in_json():
    nothing = np.zeros(0, np.int32)
    totals = Totals(images=1, loss=float("nan"))
    tally = Tally(rows=[Rows(nothing, nothing, nothing, None, (), totals)])
    assert json.loads(json.dumps(scores(tally), allow_nan=False))["loss"] is None
    assert json.loads(json.dumps(scores(Tally()), allow_nan=False))["top1"] is None


def test_from_python(checkpoint, pictures, tmp_path):
    config = EvalConfig(str(pictures), checkpoint, batch_size=4, workers=0)
    output = dataclasses.replace(config, output=tmp_path / "results.json")
    quiet = Console(quiet=True)
    results = evaluate_config(output, console=quiet, messages=quiet)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["images"] == 10 and results["config"] == as_json(output)
