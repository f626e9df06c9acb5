import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import hvit_jax
from hvit_jax.calibration.budgets import BlockCounts, propose
from hvit_jax.checkpoint import (
    Description,
    checkpoint_sha256,
    load_parameters,
    save_checkpoint,
)
from hvit_jax.commands.calibrate import main
from hvit_jax.commands.flags import read_method_args
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.folder import read_folder
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.data.source import Source, take_evenly
from hvit_jax.models.parameters import init_parameters
from hvit_jax.pictures import Preprocessing
from hvit_jax.reducers import Budgeted
from tests.evaluation_setup import make_checkpoint
from tests.small_models import with_registers

CONFIG = hvit_jax.ViTConfig(
    (40, 48), patch_size=8, depth=3, width=16, heads=2, mlp_width=32, num_classes=2
)
OPTIONS = {
    "ats": ["--blocks", "0,2"],
    "act": ["--first-block", "1", "--q-hashes", "6"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate") / "checkpoint"
    parameters = init_parameters(CONFIG, 0)
    parameters["blocks"]["in_proj"]["kernel"] *= 3
    save_checkpoint(directory, parameters, Description(CONFIG))
    return str(directory)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Seven noisy pictures of rising contrast, in two classes."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for index in range(7):
        folder = root / ("even" if index % 2 == 0 else "odd")
        folder.mkdir(exist_ok=True)
        noise = 128 + random.normal(size=(40, 48, 3)) * 10 * (index + 1)
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


def run(capsys, *arguments):
    status = main([*map(str, arguments), "-j", "0"])
    return status, *capsys.readouterr()


def test_registers_have_room(tmp_path, capsys, pictures):
    """The least budget of ATS is one more than the tokens before the patches."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", with_registers(CONFIG))
    words = (pictures, "--checkpoint", checkpoint, "--method", "ats", *OPTIONS["ats"])
    status, out, error = run(capsys, *words, "-b", "8", "--batches", "1")
    assert status == 0 and "--max-tokens" in out, error


def counts_of(*columns):
    return BlockCounts(1, "tokens", np.array(columns).T)


class TestProposals:
    @pytest.mark.parametrize(
        ("percentile", "budget"), [(25.0, 8), (50.0, 8), (75.0, 16), (99.0, 24), (100.0, 24)]
    )
    def test_the_share_of_pictures_fits_rounded_up_to_eights(self, percentile, budget):
        reducer = hvit_jax.make_reducer("ats", blocks=(1,))
        counts = [counts_of([17, 3, 9, 8])]
        assert propose(reducer, CONFIG, counts, percentile=percentile).max_tokens == (budget,)

    def test_no_more_than_all_tokens(self):
        reducer = hvit_jax.make_reducer("ats", blocks=(1,))
        assert propose(reducer, CONFIG, [counts_of([30])], percentile=99.0).max_tokens == (31,)

    def test_the_head_and_the_count_that_need_most_decide(self):
        reducer = hvit_jax.make_reducer("ats", blocks=(1,))
        counts = [counts_of([9, 1], [1, 1]), counts_of([1, 1], [17, 17]), counts_of([2, 2])]
        assert propose(reducer, CONFIG, counts, percentile=100.0).max_tokens == (24,)

    @pytest.mark.parametrize(
        ("method", "options"), [("ats", {"blocks": (0, 1)}), ("act", {"last_block": 1})]
    )
    def test_common_takes_the_largest_budget(self, method, options):
        reducer = hvit_jax.make_reducer(method, **options)
        counts = [BlockCounts(block, "", np.array([[9 + 9 * block]])) for block in (0, 1)]
        own, common = (
            propose(reducer, CONFIG, counts, percentile=99.0, common=common)
            for common in (False, True)
        )
        option = reducer.budget_option
        assert own.options()[option] == [16, 24] and common.options()[option] == [24, 24]
        if method == "act":  # blocks of a kind run as one segment
            assert common.schedule(CONFIG)[0] == common.schedule(CONFIG)[1]
            assert own.schedule(CONFIG)[0] != own.schedule(CONFIG)[1]

    @pytest.mark.parametrize("percentile", [0.0, -1.0, 100.5, float("nan")])
    def test_percentile_out_of_range(self, percentile):
        reducer = hvit_jax.make_reducer("ats", blocks=(1,))
        with pytest.raises(hvit_jax.InputError, match="above 0 and at most 100"):
            propose(reducer, CONFIG, [counts_of([9])], percentile=percentile)

    def test_summary(self):
        summary = counts_of([2, 4, 9], [4, 4, 1]).summary(50.0)
        assert summary == {
            "block": 1, "counted": "tokens", "mean": 4.0, "median": 4.0, "percentile": 4, "max": 9,
        }  # fmt: skip


def test_spread_takes_even_distances(pictures):
    source = read_folder(pictures)
    part = take_evenly(source, 3)
    assert isinstance(part, Source) and len(part) == 3
    assert part.paths == ("even/0.png", "even/4.png", "odd/1.png")
    assert part.labels == (0, 0, 1) and part.classes == ("even", "odd")
    assert part.open(1).tobytes() == source.open(2).tobytes()
    assert take_evenly(source, 99).paths == source.paths


@pytest.mark.parametrize(
    "method", [name for name, kind in hvit_jax.REDUCERS.items() if issubclass(kind, Budgeted)]
)
def test_counts_are_those_of_the_model(capsys, tmp_path, checkpoint, pictures, method):
    """Seven pictures in batches of four: the eighth row is padding."""
    output = tmp_path / "budgets.json"
    status, printed, errors = run(
        capsys, pictures, "--checkpoint", checkpoint, "--method", method, *OPTIONS[method],
        "-b", 4, "--percentile", 50, "--output", output,
    )  # fmt: skip
    assert status == 0, errors
    written = json.loads(output.read_text())
    assert written["method"] == method and written["measured"]["pictures"] == 7
    assert written["measured"]["data_sha256"] == data_sha256(read_folder(pictures))
    assert written["measured"]["checkpoint_sha256"] == checkpoint_sha256(checkpoint)
    assert written["measured"]["versions"]["jax"] == jax.__version__
    option = {"ats": "max_tokens", "act": "max_clusters"}[method]
    free = {name: value for name, value in written["args"].items() if name != option}
    model = hvit_jax.load(checkpoint, method, **free)
    source = read_folder(pictures)
    pixels = [resize_and_crop(source.open(index), (40, 48)) for index in range(7)]
    graph, weights = nnx.split(model)
    features = jax.jit(lambda weights, images: nnx.merge(graph, weights).features(images))
    states = features(weights, normalize(jnp.asarray(np.stack(pixels)))).states
    blocks = model.reducer.budget_blocks(CONFIG)
    assert [row["block"] for row in written["measured"]["blocks"]] == list(blocks)
    for row, budget in zip(written["measured"]["blocks"], written["args"][option], strict=True):
        counts = model.reducer.counts(states[row["block"]])[row["counted"]]
        most = np.asarray(counts).max(-1)
        assert row["max"] == most.max() and row["mean"] == pytest.approx(counts.mean())
        assert row["percentile"] == np.sort(most)[3] <= budget
        assert budget == min(31, -(-row["percentile"] // 8) * 8)
    flag = f"--{option.replace('_', '-')} " + ",".join(map(str, written["args"][option]))
    assert f"use: {flag}" in printed
    args = read_method_args(output, method)
    assert hvit_jax.load(checkpoint, method, **args).reducer.options() == written["args"]


class TestFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(hvit_jax.InputError, match="cannot read .*No such file"):
            read_method_args(tmp_path / "none.json", "ats")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not JSON"),
            ("[1]", "holds no JSON object"),
            ('{"method": "ats", "args": [1]}', "holds no method's options"),
            ('{"args": {}}', "holds no method's options"),
            ('{"method": "act", "args": {}}', "for the method 'act', not 'ats'"),
            ('{"method": "ats", "args": {"max_tokens": "many"}}', "a.json: ats: max_tokens must"),
            ('{"method": "ats", "args": {"tokens": 3}}', "a.json: unknown option of ats 'tokens'"),
        ],
    )
    def test_wrong(self, tmp_path, text, message):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(hvit_jax.InputError, match=message):
            read_method_args(tmp_path / "a.json", "ats")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "hourglass"], "hourglass has no budgets"),
        (["--max-tokens", "9"], "--max-tokens is what this command measures"),
        (["--padding", "all"], "ats: padding='all': keeps all 31 rows, whatever max_tokens; use"),
        (["--blocks", "7"], "the model's blocks are 0 to 2"),
        (["--percentile", "0"], "above 0 and at most 100"),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["-b", "0"], "--batch-size must be at least 1, got 0"),
        (["-r", "41"], "not a multiple of the patch size"),
        (["-r", "wide"], "--resolution must be a whole number or 2 whole numbers"),
        (["-r", "40.5"], "--resolution must be a whole number or 2 whole numbers"),
    ],
)
def test_mistakes_are_reported_before_the_work(capsys, checkpoint, pictures, arguments, message):
    status, printed, errors = run(capsys, pictures, "--checkpoint", checkpoint, *arguments)
    assert status == 2 and not printed
    assert errors.count("\n") == 1 and message in errors


def test_a_checkpoint_trained_with_a_method(capsys, pictures, tmp_path):
    """Budgets are measured for that method, whatever budgets it was trained with."""
    ats = hvit_jax.make_reducer("ats", blocks=(1,), max_tokens=5)
    checkpoint = make_checkpoint(tmp_path / "ats", CONFIG, trained=ats)
    output = tmp_path / "budgets.json"
    status, _, errors = run(
        capsys, pictures, "--checkpoint", checkpoint, "--output", output, "--percentile", 100
    )
    assert status == 0 and "trained with ats blocks=1 max_tokens=5 residual=normalized" in errors
    written = json.loads(output.read_text())
    (row,) = written["measured"]["blocks"]
    assert written["args"]["blocks"] == [1] and row["max"] > 5
    evit = make_checkpoint(tmp_path / "evit", CONFIG, trained=hvit_jax.make_reducer("evit"))
    status, _, errors = run(capsys, pictures, "--checkpoint", evit)
    assert status == 2 and "evit has no budgets" in errors


def test_common_on_the_command_line(capsys, checkpoint, pictures, tmp_path):
    words = ["--checkpoint", checkpoint, "--percentile", 100, "--output", tmp_path / "b.json"]
    words += ["--method", "act", *OPTIONS["act"]]
    status, printed, errors = run(capsys, pictures, *words, "--common", "--dtype", "bfloat16")
    assert status == 0, errors
    assert errors.count("bfloat16 is slower than float32 on a CPU\n") == 1
    written = json.loads((tmp_path / "b.json").read_text())
    most = max(row["max"] for row in written["measured"]["blocks"])
    budget = min(31, -(-most // 8) * 8)
    assert (
        written["args"]["max_clusters"] == [budget] * 2 and written["measured"]["config"]["common"]
    )
    assert f"use: --max-clusters {budget},{budget}" in printed


def test_pictures_need_no_class_folders(capsys, checkpoint, pictures, tmp_path):
    flat, found = tmp_path / "flat", []
    flat.mkdir()
    for picture in pictures.glob("*/*.png"):
        shutil.copy(picture, flat)
    for data in (pictures, flat):
        output = tmp_path / f"{data.name}.json"
        status, _, errors = run(capsys, data, "--checkpoint", checkpoint, "-o", output)
        assert status == 0, errors
        found.append(json.loads(output.read_text())["measured"])
    assert found[0]["pictures"] == found[1]["pictures"] == 7
    for one, other in zip(found[0]["blocks"], found[1]["blocks"], strict=True):
        assert one == pytest.approx(other)


def test_output_is_never_replaced(capsys, checkpoint, pictures, tmp_path):
    output = tmp_path / "budgets.json"
    output.write_text("mine")
    status, _, errors = run(capsys, pictures, "--checkpoint", checkpoint, "--output", output)
    assert status == 2 and "exists already" in errors and output.read_text() == "mine"


def test_where_nothing_can_be_written_nothing_is_measured(capsys, checkpoint, pictures, tmp_path):
    output = tmp_path / "nowhere" / "b.json"
    status, out, errors = run(capsys, pictures, "--checkpoint", checkpoint, "-o", output)
    line = f"hvit calibrate: cannot write {output}: there is no folder {output.parent}\n"
    assert (status, out, errors) == (2, "", line)


def test_data_and_checkpoint_belong_together(capsys, pictures):
    status, _, errors = run(capsys, pictures)
    assert status == 2 and "give both DATA and --checkpoint DIR, or neither" in errors


def test_an_unreadable_picture_is_named(capsys, checkpoint, tmp_path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "broken.png").write_bytes(b"not a picture")
    status, _, errors = run(capsys, tmp_path, "--checkpoint", checkpoint)
    assert status == 2 and "broken.png" in errors


def test_pictures_are_prepared_as_the_checkpoint_says(capsys, checkpoint, pictures, tmp_path):
    """Squashed and normalised otherwise, the same model counts otherwise."""
    own = Preprocessing(crop_mode="squash", mean=(0.1, 0.2, 0.3), std=(0.9, 0.9, 0.9))
    other = tmp_path / "other"
    parameters = load_parameters(checkpoint, CONFIG)
    save_checkpoint(other, parameters, Description(CONFIG, preprocessing=own))
    output = tmp_path / "budgets.json"
    words = ["--checkpoint", other, "--blocks", "1", "--output", output, "-r", "40,56"]
    status, _, errors = run(capsys, pictures, *words)
    assert status == 0, errors
    (row,) = json.loads(output.read_text())["measured"]["blocks"]
    model, source = (
        hvit_jax.load(other, "ats", blocks=(1,), resolution=(40, 56)),
        read_folder(pictures),
    )
    pixels = np.stack([resize_and_crop(source.open(index), (40, 56), own) for index in range(7)])
    features = hvit_jax.jit_model(model).features(normalize(pixels, own.mean, own.std))
    assert row["mean"] == pytest.approx(
        np.asarray(model.reducer.counts(features.states[1])["tokens"]).mean()
    )
