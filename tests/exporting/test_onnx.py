"""`hvit export --format onnx`: files that ONNX Runtime and OpenVINO run to the model's numbers."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax import InputError
from hvit_jax.commands.export import main
from hvit_jax.config import Decoder, Rope
from hvit_jax.data.preprocess import normalize
from hvit_jax.exporting import ExportConfig
from hvit_jax.exporting import export as export_model
from hvit_jax.ops.arrays import gather
from hvit_jax.ops.platform import compiled_for
from hvit_jax.pictures import Preprocessing
from tests.evaluation_setup import CONFIG, make_checkpoint, make_pictures
from tests.reducers.test_contract import CASES, name

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")

from hvit_jax.exporting import classify  # noqa: E402
from hvit_jax.exporting.onnx import loader  # noqa: E402
from hvit_jax.exporting.onnx.graph import Graph  # noqa: E402
from hvit_jax.exporting.onnx.translate import translate  # noqa: E402

# What runs.py may import; it needs no JAX either.
ALONE = """
import runpy, sys
for name in ("hvit_jax", "jax", "flax", "orbax", "onnx", "jaxtyping"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# A tracing takes up to three seconds.
QUICK = ("hourglass-reconstructed", "tome")
METHODS = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


# Prefix tokens, rotary positions that merge, gates; pooling by a query; norms inside.
SWITCHES = {
    "rotary": {
        "registers": 2,
        "position_embedding": False,
        "position_prefix": 0,
        "rope": Rope.spaced(8),
        "layer_scale": True,
        "gated": True,
        "activation": "silu",
        "num_classes": 0,
    },
    "map": {
        "class_token": False,
        "position_prefix": 0,
        "pool": "map",
        "activation": "gelu_tanh",
        "num_classes": 0,
    },
    "clip": {
        "pre_norm": True,
        "patch_bias": False,
        "activation": "quick_gelu",
        "qk_norm": True,
        "num_classes": 0,
        "projection": 5,
    },
    "maps": {
        "num_classes": 0,
        "decoder": Decoder(
            "depth_dpt", 1, taps=(0, 1, 2, 3), channels=8, tap_channels=(4, 8, 12, 16)
        ),
    },
}
OTHERS = [
    ("rotary", "tome"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            ("rotary", "hourglass"),
            ("map", "tome"),
            ("map", "ats"),
            ("clip", "evo"),
            ("maps", "tome"),
        )
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return make_checkpoint(folder / "checkpoint", classes=tuple("abcdefg"))


def export_to(output, *arguments, checkpoint):
    words = ["--format", "onnx", "--checkpoint", checkpoint, *arguments, "--output", output]
    return main([str(word) for word in words])


def noise(config, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, *config.image_shape, 3), np.uint8)


@pytest.mark.parametrize("case", METHODS)
def test_one_file_gives_the_models_logits_for_any_batch(tmp_path, small_config, case):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", small_config)
    reducer = hvit_jax.make_reducer(name(case), **CASES[case].options)
    assert export_to(tmp_path / "out", *reducer.words(), checkpoint=checkpoint) == 0
    about, program = loader.load(tmp_path / "out")
    assert (about["format"], about["method"], about["batch"]) == ("onnx", name(case), None)
    pixels = noise(small_config)
    model = hvit_jax.jit_model(hvit_jax.load(checkpoint, reducer))
    expected = np.asarray(model(normalize(pixels)))
    np.testing.assert_allclose(program(pixels), expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(program(pixels[:1]), expected[:1], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("kind", "case"), OTHERS)
def test_other_backbones(tmp_path, kind, case):
    sizes = {"patch_size": 8, "depth": 4, "width": 16, "heads": 2, "mlp_width": 32}
    config = hvit_jax.ViTConfig((48, 64), **{**sizes, **SWITCHES[kind]})
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    reducer = hvit_jax.make_reducer(case, **CASES[case].options)
    assert export_to(tmp_path / "out", *reducer.words(), checkpoint=checkpoint) == 0
    _, program = loader.load(tmp_path / "out")
    pixels = noise(config)
    expected = hvit_jax.jit_model(hvit_jax.load(checkpoint, reducer))(normalize(pixels))
    np.testing.assert_allclose(program(pixels), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_openvino_runs_the_same_file(tmp_path, small_config, case):
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    checkpoint = make_checkpoint(tmp_path / "checkpoint", small_config)
    reducer = hvit_jax.make_reducer(name(case), **CASES[case].options)
    assert export_to(tmp_path / "out", *reducer.words(), checkpoint=checkpoint) == 0
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    program = openvino.Core().compile_model(tmp_path / "out" / "model.onnx", "CPU", exact)
    _, expected = loader.load(tmp_path / "out")
    for count in (3, 1):
        pixels = noise(small_config, count)
        np.testing.assert_allclose(program(pixels)[0], expected(pixels), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_the_file_says_what_its_user_has_to_know(tmp_path, inside):
    """Wherever it is copied to, with its weights if they are beside it."""
    own = Preprocessing(0.8, "squash", "timm", "bilinear", (0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    checkpoint = make_checkpoint(
        tmp_path / "checkpoint", classes=tuple("abcdefg"), preprocessing=own
    )
    words = ("--method", "evit", *(("--weights", "inside", "--batch", "2") if inside else ()))
    out = tmp_path / "out"
    assert export_to(out, *words, checkpoint=checkpoint) == 0
    assert (out / "model.onnx.data").exists() is not inside
    session = onnxruntime.InferenceSession(out / "model.onnx")
    stored = session.get_modelmeta().custom_metadata_map
    about = {key: json.loads(value) for key, value in stored.items()}
    assert about["method"] == "evit" and about["args"]["keep_rate"] == 0.7
    assert about["input"]["resolution"] == [16, 24] and about["classes"] == list("abcdefg")
    assert Preprocessing(**about["input"]["preprocessing"]) == own
    proto = onnx.load(out / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [each.version for each in proto.opset_import] == [20]
    pixels = noise(CONFIG, 2)
    model = hvit_jax.load(checkpoint, "evit")
    expected = hvit_jax.jit_model(model)(normalize(pixels, own.mean, own.std))
    (found,) = session.run(None, {"pixels": pixels})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def test_the_loader_runs_where_neither_the_package_nor_jax_is(tmp_path, tiny):
    pictures = sorted(make_pictures(tmp_path / "pictures", count=2).glob("*/*.png"))
    out = tmp_path / "out"
    assert export_to(out, checkpoint=tiny) == 0

    def run():
        words = [sys.executable, "-c", ALONE, str(out / "run.py"), *map(str, pictures)]
        return subprocess.run(words, capture_output=True, text=True, cwd="/")

    done = run()
    assert done.returncode == 0, done.stderr
    about, program = loader.load(out)
    pixels = np.stack([classify.prepared(path, about) for path in pictures])
    for path, logits, line in zip(pictures, program(pixels), done.stdout.splitlines(), strict=True):
        assert line.startswith(f"{path}: {'abcdefg'[logits.argmax()]} ")
    with open(out / "model.onnx.data", "r+b") as file:
        file.write(b"x")
    done = run()
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("run.py: model.onnx.data is damaged: ")


def test_mistakes_are_one_line(tmp_path, tiny, capsys, monkeypatch):
    sizes = ("--rounds", "1", "--q-cluster-size", "4", "--k-cluster-size", "4")
    words = ("--method", "smyrf", "--straddle", *sizes)
    assert export_to(tmp_path / "out", *words, checkpoint=tiny) == 2
    assert "smyrf with these options needs to know the batch" in capsys.readouterr().err
    config = ExportConfig(output=tmp_path / "out", checkpoint=tiny, weights="inside", format="onnx")
    with pytest.raises(InputError, match="weights do not fit inside a program"):
        export_model(config, most_bytes=1000)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export_to(tmp_path / "out", checkpoint=tiny) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "pip install 'hvit-jax[onnx]'" in errors
    assert not (tmp_path / "out").exists()


def run_both(function, *arrays):
    """Run a function as JAX does, and as an ONNX file; both in one dictionary a call."""
    symbol = jax.export.symbolic_shape("b")[0]
    shapes = [jax.ShapeDtypeStruct((symbol, *x.shape[1:]), x.dtype) for x in arrays]
    graph, names = Graph(symbol), [f"x{index}" for index in range(len(arrays))]
    inputs = [graph.input(n, s.shape, s.dtype) for n, s in zip(names, shapes, strict=True)]
    with compiled_for("onnx"):
        program = jax.make_jaxpr(function)(*shapes)
    (result,) = translate(graph, program, inputs)
    graph.finish(graph.expand(result, program.out_avals[0].shape), "y")
    types = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(x.dtype)) for x in arrays]
    made = onnx.helper.make_graph(
        graph.nodes,
        "test",
        [
            onnx.helper.make_tensor_value_info(n, t, ["b", *x.shape[1:]])
            for n, t, x in zip(names, types, arrays, strict=True)
        ],
        [
            onnx.helper.make_tensor_value_info(
                "y", onnx.helper.np_dtype_to_tensor_dtype(result.dtype), None
            )
        ],
        [onnx.numpy_helper.from_array(a, n) for n, a in graph.constants.items()],
    )
    proto = onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (found,) = session.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))
    np.testing.assert_allclose(found, function(*arrays), rtol=1e-6, atol=1e-6)
    return graph


ROWS = jnp.asarray([[3.0, -1.5, 2.0, -7.25, 0.0], [1.0, 1.0, -2.0, 5.5, -0.5]])
WHOLE = jnp.asarray([[4, 0, 2, 3, 1], [1, 4, 0, 2, 3]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.lax.rem(x, jnp.full_like(x, 2)) + jnp.sign(x) - jax.lax.rsqrt(x**2 + 1),
        lambda x: jnp.clip(x, -1, 2) * x**3 + jnp.tanh(x) * jax.nn.silu(x) + jnp.cos(jnp.sin(x)),
        lambda x: jnp.cumsum(x, 1) - jax.lax.cumsum(x, 1, reverse=True) + jnp.floor(x),
        lambda x: jnp.where((x > 0) ^ (x < 2) | ~(x != 3), x, -x) + jnp.log(jnp.maximum(x, 1)),
        lambda x: jax.lax.top_k(x, 3)[0][:, 1:] + x.argmin(-1, keepdims=True) - (x > 1).argmax(),
        lambda x: (x > 0).all(1).astype(jnp.float32) + (x > 4).any(1) + x.min(1),
        lambda x: jnp.pad(x, ((0, 0), (2, 1)), constant_values=4)[:, ::2],
        lambda x: jax.lax.pad(x > 0, False, ((0, 0, 0), (-1, 3, 0))).astype(jnp.int32),
        lambda x: jnp.stack(jnp.split(x[:, :4], 2, axis=1)).swapaxes(0, 1).reshape(-1, 4),
        lambda x: jnp.einsum("bi,bj,jk->bik", x, x, jnp.arange(10.0).reshape(5, 2)),
        lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 2))], axis=1) @ jnp.eye(7),
        lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 2, 5)).reshape(-1, 5).sum(1),
        lambda x: jax.lax.scan(lambda c, r: (c + r, c * r), x[:, 0], x.T, reverse=True)[1].T,
        lambda x: jax.lax.conv_general_dilated(
            x[:, None, :, None],
            jnp.arange(24.0).reshape(1, 3, 1, 8) - 9,
            (1, 2),
            ((0, 0), (2, 1)),
            rhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * x + i, x),
        lambda x: jnp.take(x, jnp.array([4, 0]), axis=1, mode="clip"),
    ],
)  # fmt: skip
def test_operations(function):
    run_both(function, ROWS)


def test_indices_and_writing():
    """Each row its own places."""
    exact = {"unique_indices": True, "mode": "promise_in_bounds"}

    def write(values, index, new):
        return jax.vmap(lambda v, i, n: v.at[i].set(n, **exact))(values, index, new)

    run_both(lambda x, i: write(x, i[:, :3], -x[:, :3]), ROWS, WHOLE)
    wide = jnp.stack([ROWS, 2 * ROWS], axis=-1)
    run_both(lambda x, i: write(x, i[:, 2:], -x[:, :3]), wide, WHOLE)
    run_both(lambda x, i: gather(x, i), wide, WHOLE)
    run_both(lambda x, i: jnp.take_along_axis(x, i - 2, 1, mode="clip"), ROWS, WHOLE)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: jnp.fft.fft(x).real, "does not know JAX's operation 'fft'"),
        (lambda x: jnp.sort(x), "sorts by one key only, and keeps no order of ties"),
        (lambda x: x.at[:, jnp.array([1, 1])].set(0), "writes to different places"),
        (lambda x: x.at[:, jnp.array([1, 9])].set(0, unique_indices=True), "writes to different"),
        (lambda x: jnp.take(x, x[:, 0].astype(int), axis=1), "promised to be in range"),
        (lambda x: x + jnp.arange(x.shape[0])[:, None], "cannot count up to the batch size"),
        (lambda x: jax.lax.while_loop(lambda y: y.sum() < 0, lambda y: y + 1, x), "'while'"),
        (
            lambda x: jax.lax.conv_transpose(x[:, :, None], jnp.ones((2, 1, 1)), (2,), "VALID"),
            "knows no convolutions that enlarge",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(function, message):
    with pytest.raises(InputError, match=message):
        run_both(function, ROWS)


def test_constants_are_stored_once_and_computed_ahead():
    kernel = np.arange(25, dtype=np.float32).reshape(5, 5)
    graph = run_both(lambda x: x @ kernel @ (2 * kernel / 2).T.T @ jnp.asarray(kernel), ROWS)
    assert [node.op_type for node in graph.nodes] == ["MatMul"] * 3 + ["Identity"]
    assert len(graph.constants) == 1
