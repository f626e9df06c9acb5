"""Conversion from PyTorch and back."""

import argparse
import dataclasses
import hashlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file as save_safetensors

import hvit_jax
from hvit_jax.checkpoint import Description, load_parameters, read_description, save_checkpoint
from hvit_jax.commands.convert import main
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.detect import detect
from hvit_jax.convert.reader import StateDict
from hvit_jax.convert.switches import Stated
from hvit_jax.models.parameters import abstract_parameters, flatten
from hvit_jax.pictures import Preprocessing
from tests.convert.arrays import assert_same_arrays
from tests.torch_files import as_torchvision, save, swag_state


def converted(state, folder, name="model", heads=2):
    """Convert a state dict and load the tree."""
    convert_file(save(state, folder / f"{name}.torch"), folder / name, heads=heads)
    return flatten(load_parameters(folder / name, read_description(folder / name).config))


@pytest.fixture(scope="module")
def torchvision_checkpoint(goldens, tmp_path_factory):
    directory = tmp_path_factory.mktemp("torchvision") / "checkpoint"
    source = goldens.folder / "checkpoint_torchvision.pth"
    if not source.exists():
        pytest.skip("no torchvision checkpoint in this golden folder")
    convert_file(source, directory, heads=goldens.size["num_heads"])
    return directory


def golden_logits_case(goldens):
    dense = [name for name, case in goldens.configs.items() if case["method"] == "dense"]
    if not dense:
        pytest.skip("no dense configuration in this golden folder")
    return dense[0]


def test_parity_formats_give_the_same_tree(golden_checkpoint, torchvision_checkpoint, goldens):
    swag, vision = map(read_description, (golden_checkpoint, torchvision_checkpoint))
    assert swag.config == vision.config
    size = goldens.size
    assert swag.config == hvit_jax.ViTConfig(
        size["image_size"],
        patch_size=size["patch_size"],
        depth=size["num_layers"],
        width=size["hidden_dim"],
        heads=size["num_heads"],
        mlp_width=size["mlp_dim"],
        num_classes=size["num_classes"],
    )
    assert (swag.source["format"], vision.source["format"]) == ("SWAG", "torchvision")
    trees = [
        flatten(load_parameters(directory, swag.config))
        for directory in (golden_checkpoint, torchvision_checkpoint)
    ]
    assert_same_arrays(*trees)


def test_parity_logits_of_torchvision_format(torchvision_checkpoint, goldens):
    name = golden_logits_case(goldens)
    model = hvit_jax.load(torchvision_checkpoint)
    logits = hvit_jax.jit_model(model)(jax.numpy.asarray(goldens.images(name)))
    np.testing.assert_allclose(logits, goldens.models[f"{name}/logits"], atol=1e-4, rtol=0)


def test_parity_headless_golden_gives_the_features_before_the_head(goldens, tmp_path):
    state = torch.load(goldens.folder / "checkpoint.torch", weights_only=True)
    if "head.layers.head.weight" not in state:
        pytest.skip("the golden checkpoint has no head")
    weight, bias = (state.pop(f"head.layers.head.{part}").numpy() for part in ("weight", "bias"))
    source = save(state, tmp_path / "headless.torch")
    description = convert_file(source, tmp_path / "c", heads=goldens.size["num_heads"])
    assert description.config.num_classes == 0
    name = golden_logits_case(goldens)
    features = hvit_jax.load(tmp_path / "c")(jax.numpy.asarray(goldens.images(name)))
    logits = np.asarray(features) @ weight.T + bias
    np.testing.assert_allclose(logits, goldens.models[f"{name}/logits"], atol=1e-4, rtol=0)


def test_every_layout_by_hand(tmp_path):
    state = swag_state(depth=2, width=6, mlp=10, positions=10, patch=4, classes=3)
    tree = converted(state, tmp_path)
    source = {key: tensor.numpy() for key, tensor in state.items()}
    expected = {
        "class_token": source["class_token"].reshape(6),
        "patch_embed/bias": source["conv_proj.bias"],
        "pos_embedding": source["encoder.pos_embedding"].reshape(10, 6),
        "ln/scale": source["encoder.ln.weight"],
        "ln/bias": source["encoder.ln.bias"],
        "head/kernel": source["head.layers.head.weight"].T,
        "head/bias": source["head.layers.head.bias"],
    }
    pixels = [
        (row, column, colour) for row in range(4) for column in range(4) for colour in (0, 1, 2)
    ]
    expected["patch_embed/kernel"] = [
        source["conv_proj.weight"][:, colour, row, column] for row, column, colour in pixels
    ]
    for path, key in {
        "in_proj": "self_attention.in_proj_",
        "out_proj": "self_attention.out_proj.",
        "linear_1": "mlp.linear_1.",
        "linear_2": "mlp.linear_2.",
    }.items():
        blocks = [f"encoder.layers.layer_{i}.{key}" for i in (0, 1)]
        expected[f"blocks/{path}/kernel"] = [source[f"{block}weight"].T for block in blocks]
        expected[f"blocks/{path}/bias"] = [source[f"{block}bias"] for block in blocks]
    for norm in ("ln_1", "ln_2"):
        blocks = [f"encoder.layers.layer_{i}.{norm}" for i in (0, 1)]
        expected[f"blocks/{norm}/scale"] = [source[f"{block}.weight"] for block in blocks]
        expected[f"blocks/{norm}/bias"] = [source[f"{block}.bias"] for block in blocks]
    assert_same_arrays(tree, {name: np.asarray(array) for name, array in expected.items()})


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("classes", [0, 3])
def test_torchvision_names_give_swags_tree(tmp_path, older, classes):
    state = swag_state(classes=classes)
    swag = converted(state, tmp_path, "swag")
    vision = converted(as_torchvision(state, older=older), tmp_path, "vision")
    assert_same_arrays(swag, vision)
    wanted = "torchvision (older)" if older else "torchvision"
    assert read_description(tmp_path / "vision").source["format"] == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path, dtype):
    half = {key: tensor.to(dtype) for key, tensor in swag_state().items()}
    tree = converted(half, tmp_path, "half")
    wide = converted({key: tensor.float() for key, tensor in half.items()}, tmp_path, "wide")
    assert_same_arrays(tree, wide)
    assert {leaf.dtype for leaf in tree.values()} == {np.dtype(np.float32)}


def test_double_precision_is_narrowed_and_said(tmp_path, capsys):
    state = swag_state()
    state["encoder.ln.bias"] = torch.full((6,), 1 / 3, dtype=torch.float64)
    source = save(state, tmp_path / "double.pth")
    assert main([str(source), str(tmp_path / "double"), "--heads", "2"]) == 0
    assert "narrowed    float64 to float32\n" in capsys.readouterr().out
    description = read_description(tmp_path / "double")
    assert description.source["narrowed"] == "float64 to float32"
    tree = flatten(load_parameters(tmp_path / "double", description.config))
    assert tree["ln/bias"].tolist() == [np.float32(1 / 3)] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vision", [False, True])
def test_safetensors_are_read_without_torch(tmp_path, monkeypatch, dtype, vision):
    state = {key: tensor.to(dtype) for key, tensor in swag_state().items()}
    state = as_torchvision(state) if vision else state
    expected = converted(state, tmp_path, "torch")
    source = tmp_path / "model.safetensors"
    save_safetensors({f"module.{key}": each.contiguous() for key, each in state.items()}, source)
    monkeypatch.setitem(sys.modules, "torch", None)
    description = convert_file(source, tmp_path / "safe", heads=2)
    assert description.source["entry"] == "module"
    assert description.source["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert_same_arrays(flatten(load_parameters(tmp_path / "safe", description.config)), expected)


@pytest.mark.parametrize(
    "vision, head",
    [
        *[(True, f"heads{rest}") for rest in ("", ".0", ".1", ".head.0", ".head.1")],
        *[(False, f"head{rest}") for rest in ("", ".0", ".1")],
    ],
)
def test_replaced_heads(tmp_path, vision, head):
    state = as_torchvision(swag_state()) if vision else swag_state()
    usual = "heads.head." if vision else "head.layers.head."
    renamed = {key.replace(usual, f"{head}."): tensor for key, tensor in state.items()}
    assert renamed.keys() != state.keys()
    assert_same_arrays(converted(renamed, tmp_path, "a"), converted(state, tmp_path, "b"))


def test_namespace_beside_the_weights(tmp_path):
    arguments = argparse.Namespace(lr=0.1, output=Path("out"), inner=argparse.Namespace(x=[1]))
    content = {"model": swag_state(), "args": arguments, "epoch": 3}
    assert_same_arrays(converted(content, tmp_path, "a"), converted(swag_state(), tmp_path, "b"))


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_state_dict_is_found(tmp_path, wrapper):
    state = swag_state()
    tree = converted({wrapper: state, "epoch": 3, "optimizer": {}}, tmp_path, "wrapped")
    assert_same_arrays(tree, converted(state, tmp_path, "plain"))
    assert read_description(tmp_path / "wrapped").source["entry"] == wrapper


def test_parameters_and_the_old_file_format_are_read(tmp_path):
    state = swag_state()
    trained = {key: torch.nn.Parameter(tensor) for key, tensor in state.items()}
    path = tmp_path / "old.torch"
    torch.save(trained, path, _use_new_zipfile_serialization=False)
    convert_file(path, tmp_path / "old", heads=2)
    config = read_description(tmp_path / "old").config
    tree = flatten(load_parameters(tmp_path / "old", config))
    assert_same_arrays(tree, converted(state, tmp_path, "new"))


def test_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        tree = converted(swag_state(), tmp_path, "without")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_arrays(tree, converted(swag_state(), tmp_path, "with"))


def test_description_tells_the_source(tmp_path):
    path = save(swag_state(), tmp_path / "small.torch")
    description = convert_file(path, tmp_path / "small", heads=3)
    assert description == read_description(tmp_path / "small")
    assert description.source == {
        "file": "small.torch",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "format": "SWAG",
    }
    assert description.config == hvit_jax.ViTConfig(12, 4, 2, 6, 3, 10, 3)


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("name", ["vit_b16", "vit_l16", "vit_h14"])
def test_published_sizes_need_no_heads(name, vision):
    config = hvit_jax.MODELS[name]
    state = published_state(config)
    state = as_torchvision(state) if vision else state
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    numbers = dict.fromkeys(shapes, lambda: np.zeros(()))
    found = detect(StateDict(name, shapes, numbers=numbers), Stated(), Progress(disable=True))
    assert found.config == config


def published_state(config):
    """A state dict of full size that takes no memory."""
    real = swag_state(depth=1, classes=1)
    sizes = {6: config.width, 18: 3 * config.width, 10: config.mlp_width}
    state = {}
    for key, tensor in real.items():
        shape = [sizes.get(side, side) for side in tensor.shape]
        if key == "conv_proj.weight":
            shape[2:] = [config.patch_size] * 2
        if key == "encoder.pos_embedding":
            shape[0] = config.num_patches + 1
        if key.startswith("head."):
            shape[0] = config.num_classes
        for i in range(config.depth if "layer_0" in key else 1):
            state[key.replace("layer_0", f"layer_{i}")] = torch.empty(shape, device="meta")
    return state


def assert_same_file(path, state):
    written = torch.load(path, weights_only=True)
    assert list(written) == list(state)
    for key, tensor in written.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), key
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("vision", [False, True])
def test_to_torch_gives_the_same_state_dict(tmp_path, classes, vision):
    state = swag_state(classes=classes)
    source = save(as_torchvision(state) if vision else state, tmp_path / "in.torch")
    convert_file(source, tmp_path / "jax", heads=2)
    export_file(tmp_path / "jax", tmp_path / "out.torch")
    assert_same_file(tmp_path / "out.torch", as_torchvision(state) if vision else state)
    export_file(tmp_path / "jax", tmp_path / "swag.torch", layout="swag")
    assert_same_file(tmp_path / "swag.torch", state)


def test_parity_to_torch_of_both_goldens(
    golden_checkpoint, torchvision_checkpoint, goldens, tmp_path
):
    state = torch.load(goldens.folder / "checkpoint.torch", weights_only=True)
    for number, checkpoint in enumerate((golden_checkpoint, torchvision_checkpoint)):
        export_file(checkpoint, tmp_path / f"{number}.torch", layout="swag")
        assert_same_file(tmp_path / f"{number}.torch", state)


def test_to_torch_of_trained_parameters_on_a_grid_that_is_not_square(tmp_path, small_config):
    random = np.random.default_rng(1)
    parameters = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32),
        abstract_parameters(small_config),
    )
    save_checkpoint(tmp_path / "jax", parameters, Description(small_config))
    export_file(tmp_path / "jax", tmp_path / "out.torch")
    written = torch.load(tmp_path / "out.torch", weights_only=True)
    positions = np.asarray(parameters["pos_embedding"])
    np.testing.assert_array_equal(written["encoder.pos_embedding"][:, 0], positions)
    kernel = np.asarray(parameters["blocks"]["linear_2"]["kernel"])
    np.testing.assert_array_equal(
        written["encoder.layers.layer_3.mlp.linear_2.weight"], kernel[3].T
    )


def described(folder, name, **options):
    """Convert a file and give the sizes and the tree."""
    convert_file(folder / name, folder / f"{name}.jax", **options)
    description = read_description(folder / f"{name}.jax")
    return description, flatten(load_parameters(folder / f"{name}.jax", description.config))


@pytest.mark.parametrize("grid", [(2, 8), (2, 6)])
@pytest.mark.parametrize("layout", ["swag", "torchvision"])
@pytest.mark.parametrize("ending", ["torch", "safetensors"])
def test_rectangular_grids_come_back(tmp_path, grid, layout, ending):
    sizes = hvit_jax.ViTConfig((4 * grid[0], 4 * grid[1]), 4, 2, 6, 3, 10, 3)
    random = np.random.default_rng(1)
    parameters = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), abstract_parameters(sizes)
    )
    before = Description(sizes, {}, ("ant", "bee", "cat"), Preprocessing(0.875))
    save_checkpoint(tmp_path / "jax", parameters, before)
    out = tmp_path / f"out.{ending}"
    export_file(tmp_path / "jax", out, layout=layout)
    after, tree = described(tmp_path, out.name)
    assert dataclasses.replace(after, source={}) == before
    assert_same_arrays(tree, flatten(parameters))


def test_grid_that_the_file_does_not_tell(tmp_path):
    state = swag_state(positions=17)
    for positions, name in ((17, "square.torch"), (17, "flat.torch"), (13, "12.torch")):
        save(swag_state(positions=positions), tmp_path / name)
    assert described(tmp_path, "square.torch", heads=2)[0].config.grid == (4, 4)
    flat, tree = described(tmp_path, "flat.torch", heads=2, resolution=(8, 32))
    assert flat.config.image_shape == (8, 32)
    positions = state["encoder.pos_embedding"][:, 0].numpy()
    np.testing.assert_array_equal(tree["pos_embedding"], positions)
    assert described(tmp_path, "12.torch", heads=2, resolution=(8, 24))[0].config.grid == (2, 6)


def test_what_options_say_wins_over_what_the_file_says(tmp_path):
    sizes = hvit_jax.ViTConfig((8, 32), 4, 1, 6, 3, 10, 0)
    parameters = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, np.float32), abstract_parameters(sizes)
    )
    save_checkpoint(tmp_path / "jax", parameters, Description(sizes))
    export_file(tmp_path / "jax", tmp_path / "out.torch")
    config = described(tmp_path, "out.torch", heads=2, resolution=(32, 8))[0].config
    assert (config.grid, config.heads) == ((8, 2), 2)
    written = torch.load(tmp_path / "out.torch", weights_only=True)
    torch.save({"model": written, "epoch": 3}, tmp_path / "in_a_dict.pth")
    assert described(tmp_path, "in_a_dict.pth")[0].config == sizes


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_to_torch_in_torchvisions_layout(tmp_path, older, ending):
    state = swag_state()
    save(as_torchvision(state, older=older), tmp_path / "in.pth")
    convert_file(tmp_path / "in.pth", tmp_path / "jax", heads=2)
    export_file(tmp_path / "jax", tmp_path / f"out.{ending}", layout="torchvision")
    expected = as_torchvision(state)
    if ending == "pth":
        assert_same_file(tmp_path / "out.pth", expected)
    else:
        written = load_safetensors(tmp_path / "out.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[key], expected[key]) for key in expected)


def test_to_torch_writes_safetensors_without_torch(tmp_path, monkeypatch):
    convert_file(save(swag_state(), tmp_path / "in.pth"), tmp_path / "jax", heads=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        export_file(tmp_path / "jax", tmp_path / "out.safetensors")
    written = load_safetensors(tmp_path / "out.safetensors")
    assert all(torch.equal(written[key], each) for key, each in swag_state().items())


def test_pytorch_loads_what_is_written(tmp_path):
    """Its modules look at the metadata of a state dict, where ours stands beside theirs."""
    linear = torch.nn.ModuleDict({"class_token": torch.nn.Linear(2, 2)})
    convert_file(save(swag_state(), tmp_path / "in.pth"), tmp_path / "jax", heads=2)
    export_file(tmp_path / "jax", tmp_path / "out.pth")
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    result = linear.load_state_dict(state, strict=False)
    assert set(result.unexpected_keys) == set(swag_state())
