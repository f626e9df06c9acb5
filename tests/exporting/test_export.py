"""`hvit export`: programs that run without this package and give its numbers."""

import json
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
from jax import export
from PIL import Image

import hvit_jax
from hvit_jax import InputError, demo
from hvit_jax.checkpoint import checkpoint_sha256
from hvit_jax.commands.export import main
from hvit_jax.config import Compute
from hvit_jax.data.folder import read_folder
from hvit_jax.data.picture import ORIENTATION
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.exporting import ExportConfig, classify, loader
from hvit_jax.exporting import export as export_model
from hvit_jax.fields import as_json
from hvit_jax.pictures import Preprocessing
from tests.evaluation_setup import CONFIG, make_checkpoint, make_pictures
from tests.reducers.test_contract import CASES, name

# Runs a script as if hvit_jax, flax and orbax were not installed.
ALONE = """
import runpy, sys
for name in ("hvit_jax", "flax", "orbax", "optax", "jaxtyping"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return make_checkpoint(folder / "checkpoint", classes=tuple("abcdefg"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), count=3)
    return sorted(folder.glob("*/*.png"))


def export_to(output, *arguments, checkpoint=None):
    source = () if checkpoint is None else ("--checkpoint", checkpoint)
    return main([*map(str, (*source, *arguments)), "--output", str(output)])


def run_alone(folder, *arguments):
    words = [sys.executable, "-c", ALONE, str(folder / "run.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd="/")


def prepared(paths, resolution):
    about = {"input": {"resolution": resolution, "preprocessing": as_json(Preprocessing())}}
    return np.stack([classify.prepared(path, about) for path in paths])


@pytest.mark.slow_for("pitome", "tofu", "diffrate", "atc", "random", "pool", "tome_dense")
@pytest.mark.parametrize("case", CASES)
def test_one_program_gives_the_models_logits_for_any_batch(tmp_path, small_config, case):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", small_config)
    reducer = hvit_jax.make_reducer(name(case), **CASES[case].options)
    words = (*reducer.words(), "--platforms", "cpu")
    assert export_to(tmp_path / "out", *words, checkpoint=checkpoint) == 0
    about, program = loader.load(tmp_path / "out")
    assert (about["method"], about["batch"]) == (name(case), None)
    assert about["checkpoint_sha256"] == checkpoint_sha256(checkpoint)
    assert about["matmul_precision"] == "highest"
    random, shape = np.random.default_rng(0), (3, *small_config.image_shape, 3)
    pixels = random.integers(0, 256, shape, dtype=np.uint8)
    model = hvit_jax.jit_model(hvit_jax.load(checkpoint, reducer))
    expected = np.asarray(model(normalize(pixels)))
    np.testing.assert_allclose(program(pixels), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(program(pixels[:1]), expected[:1], rtol=1e-5, atol=2e-5)


def test_the_demo(tmp_path):
    """What the README exports, on pictures."""
    assert export_to(tmp_path / "out", "--method", "hourglass", "--platforms", "cpu") == 0
    about, program = loader.load(tmp_path / "out")
    source = read_folder(demo.images_dir())
    pixels = np.stack([resize_and_crop(source.open(place), (56, 56)) for place in (0, 400, 900)])
    logits = hvit_jax.jit_model(hvit_jax.load(demo.checkpoint_dir(), "hourglass"))(
        normalize(pixels)
    )
    np.testing.assert_allclose(program(pixels), logits, rtol=1e-5, atol=2e-5)
    assert about["classes"][0] == "0-t-shirt" and len(about["classes"]) == 10


@pytest.mark.parametrize("extra", [(), ("--weights", "inside", "--batch", "2")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_inside_and_beside_in_both_dtypes(tmp_path, tiny, pictures, dtype, extra):
    out = tmp_path / "out"
    words = ("--method", "evit", "--dtype", dtype, "--platforms", "cpu", *extra)
    assert export_to(out, *words, checkpoint=tiny) == 0
    assert (out / "weights.npz").exists() == (not extra)
    about, program = loader.load(out)
    found = [logits for _, logits in classify.classify(about, program, pictures)]
    model = hvit_jax.load(tiny, "evit", dtype=dtype)
    expected = hvit_jax.jit_model(model)(normalize(prepared(pictures, CONFIG.resolution)))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_the_loader_runs_where_the_package_is_not(tmp_path, tiny, pictures):
    out = tmp_path / "out"
    assert export_to(out, "--method", "evit", checkpoint=tiny) == 0
    done = run_alone(out, *pictures)
    assert done.returncode == 0, done.stderr
    model = hvit_jax.load(tiny, "evit")
    logits = hvit_jax.jit_model(model)(normalize(prepared(pictures, CONFIG.resolution)))
    shares = 100 * jax.nn.softmax(logits)
    lines = done.stdout.splitlines()
    for path, row, line in zip(pictures, np.asarray(shares), lines, strict=True):
        assert line.startswith(f"{path}: {'abcdefg'[row.argmax()]} {row.max():.1f} %, ")
    (out / "model.cpu.jaxexport").write_bytes(b"nothing")
    done = run_alone(out, *pictures)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("run.py: model.cpu.jaxexport is damaged: ")
    assert done.stderr.count("\n") == 1


def test_the_checkpoints_preprocessing_is_in_the_export(tmp_path, pictures):
    """In run.py, which resizes and cuts, and in the program, which normalises."""
    own = Preprocessing(0.8, "squash", "timm", "bilinear", (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint", classes=tuple("abcdefg"), preprocessing=own
    )
    assert export_to(tmp_path / "out", "--platforms", "cpu", checkpoint=checkpoint) == 0
    done = run_alone(tmp_path / "out", pictures[0])
    assert done.returncode == 0, done.stderr
    pixels = resize_and_crop(Image.open(pictures[0]), CONFIG.image_shape, own)
    logits = hvit_jax.load(checkpoint)(normalize(pixels[None], own.mean, own.std))[0]
    shares = 100 * np.asarray(jax.nn.softmax(logits))
    best = "abcdefg"[shares.argmax()]
    assert done.stdout.startswith(f"{pictures[0]}: {best} {shares.max():.1f} %, ")


@pytest.mark.parametrize(("words", "method"), [((), "evit"), (("--method", "dense"), "dense")])
def test_a_checkpoint_trained_with_a_method(tmp_path, capsys, words, method):
    evit = hvit_jax.make_reducer("evit", keep_rate=0.4)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", trained=evit)
    out = tmp_path / "out"
    assert export_to(out, "--platforms", "cpu", *words, checkpoint=checkpoint) == 0
    about = json.loads((out / "export.json").read_text())
    reducer = evit.resolve(CONFIG) if method == "evit" else hvit_jax.make_reducer("dense")
    assert (about["method"], about["args"]) == (method, reducer.options())
    assert ("trained with evit keep_rate=0.4" in capsys.readouterr().err) is (method == "evit")


def test_damage_is_found(tmp_path, tiny):
    out = tmp_path / "out"
    assert export_to(out, "--platforms", "cpu", checkpoint=tiny) == 0
    weights = bytearray((out / "weights.npz").read_bytes())
    weights[len(weights) // 2] ^= 1
    (out / "weights.npz").write_bytes(weights)
    with pytest.raises(InputError, match="weights.npz is damaged"):
        loader.load(out)
    about = json.loads((out / "export.json").read_text())
    (out / "model.cpu.jaxexport").write_bytes(b"x" * 40)
    about["files"]["model.cpu.jaxexport"] = {"bytes": 40, "crc32": zlib.crc32(b"x" * 40)}
    (out / "export.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="jax cannot read the program .made with jax"):
        loader.load(out)
    about["programs"] = {"tpu": "model.tpu.jaxexport"}
    (out / "export.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match="exported for tpu; this machine's platform is cpu"):
        loader.load(out)


def test_pictures_are_read_as_everywhere(tmp_path, tiny):
    """With the limit on pixels, upright as in viewers, and 16 bits of grey scaled to 8."""
    assert export_to(tmp_path / "out", "--platforms", "cpu", checkpoint=tiny) == 0
    done = run_alone(tmp_path / "out", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: run.py [-h] PICTURE")
    (tmp_path / "a.png").write_bytes(b"no picture")
    header = b"P5 12000 12000 255\n"
    (tmp_path / "huge.pgm").write_bytes(header + bytes(10))
    for file, reason in (
        ("a.png", "not a picture that Pillow can read"),
        ("none.png", "No such file or directory"),
        ("huge.pgm", "12000 x 12000 pixels are more than the 134 million that are decoded"),
    ):
        done = run_alone(tmp_path / "out", tmp_path / file)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"run.py: picture {tmp_path / file}: {reason}")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8)
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    expected = resize_and_crop(Image.fromarray(pixels), (24, 16))
    np.testing.assert_array_equal(prepared([tmp_path / "b.png"], (24, 16))[0], expected)


def test_programs_for_gpus_are_made_without_one(tmp_path, tiny):
    """Each platform has its own: attention goes head by head on CPUs only."""
    out = tmp_path / "out"
    words = ("--platforms", "cuda,cpu,cuda", "--dtype", "bfloat16")
    assert export_to(out, *words, checkpoint=tiny) == 0
    about = json.loads((out / "export.json").read_text())
    assert about["programs"] == {name: f"model.{name}.jaxexport" for name in ("cuda", "cpu")}
    blobs = {name: bytearray((out / file).read_bytes()) for name, file in about["programs"].items()}
    programs = {name: export.deserialize(blob) for name, blob in blobs.items()}
    assert {name: each.platforms for name, each in programs.items()} == {
        "cuda": ("cuda",),
        "cpu": ("cpu",),
    }
    loops = {name: each.mlir_module().count("while") for name, each in programs.items()}
    assert loops["cuda"] < loops["cpu"]
    assert about["calling_convention_version"] == programs["cpu"].calling_convention_version
    assert about["input"]["resolution"] == [16, 24] and about["classes"] == list("abcdefg")
    assert about["model"]["width"] == CONFIG.width and about["attention"] == "xla"


def test_a_method_that_needs_to_know_the_batch(tmp_path, tiny, capsys):
    sizes = ("--rounds", "1", "--q-cluster-size", "4", "--k-cluster-size", "4")
    words = ("--method", "smyrf", "--straddle", *sizes)
    assert export_to(tmp_path / "out", *words, checkpoint=tiny) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "smyrf with these options needs to know the batch" in errors
    assert "--batch N" in errors and not (tmp_path / "out").exists()
    assert export_to(tmp_path / "out", *words, "--batch", "2", checkpoint=tiny) == 0


def test_a_method_without_budgets_is_mentioned(tmp_path, tiny, capsys):
    words = ("--platforms", "cpu", "--method", "ats")
    assert export_to(tmp_path / "out", *words, checkpoint=tiny) == 0
    assert "ats saves nothing without --max-tokens" in capsys.readouterr().err


def test_a_model_without_a_head_gives_features(tmp_path, pictures):
    config = hvit_jax.ViTConfig(
        (16, 24), patch_size=8, depth=2, width=16, heads=2, mlp_width=32, num_classes=0
    )
    checkpoint = make_checkpoint(tmp_path / "headless", config)
    assert export_to(tmp_path / "out", "--platforms", "cpu", checkpoint=checkpoint) == 0
    classify.main(lambda: loader.load(tmp_path / "out"), [str(pictures[0])])
    about, program = loader.load(tmp_path / "out")
    assert about["output"] == "features of CLS"
    assert program(np.zeros((2, 16, 24, 3), np.uint8)).shape == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--platforms", "gpu"], "--platforms must be one of cpu, cuda, rocm, tpu: 'gpu'\n"),
        (["--platforms", "cpu,cudo"], "'cudo', did you mean cuda?"),
        (["--platforms", ","], "--platforms needs at least one name"),
        (["--format", "onnx", "--dtype", "bfloat16"], "--format onnx computes in float32"),
        (["--format", "onnx", "--platforms", "cpu"], "--platforms is for --format jax"),
        (["--batch", "0"], "--batch must be symbolic or a number of at least 1, got '0'"),
        (["--batch", "many"], "--batch must be symbolic"),
        (["-r", "57"], "not a multiple of the patch size"),
        (["--checkpoint", "/nowhere"], "checkpoint /nowhere does not exist"),
        (["--method", "evit", "--keep-rate", "2"], "keep_rate=2"),
        (["--output", "/tmp"], "/tmp exists already"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    assert main(["--output", str(tmp_path / "out"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()


def test_what_no_program_can_be_made_with_is_refused_in_a_record_too(tmp_path):
    with pytest.raises(InputError, match="attention by plain XLA, not by cudnn"):
        ExportConfig(output=tmp_path / "out", compute=Compute(attention="cudnn"))
    wrong = pytest.raises(InputError, match="--dtype must be one of float32, bfloat16: 'float64'")
    with jax.enable_x64(True), wrong:
        ExportConfig(output=tmp_path / "out", compute=Compute("float64"))


def test_weights_too_large_for_a_program(tmp_path, tiny):
    config = ExportConfig(output=tmp_path / "out", checkpoint=tiny, weights="inside")
    with pytest.raises(InputError, match="weights do not fit inside a program"):
        export_model(config, most_bytes=1000)
