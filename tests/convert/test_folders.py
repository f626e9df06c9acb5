"""Folders as the Hugging Face hub has them: several files, and what is wrong with them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from hvit_jax import InputError
from hvit_jax.checkpoint import load_parameters
from hvit_jax.commands.convert import main
from hvit_jax.convert import convert_file
from tests.backbone_states import as_dinov2, as_dinov3, timm_state

BACKBONES = Path(__file__).parents[1] / "backbones"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """Copy a golden folder, with changes to its config.json; None removes a field."""

    def make(name, **changes):
        target = tmp_path / "source"
        target.mkdir()
        config = json.loads((BACKBONES / name / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (target / "config.json").write_text(json.dumps(config))
        for file in ("model.safetensors", "preprocessor_config.json"):
            if (BACKBONES / name / file).is_file():
                shutil.copy(BACKBONES / name / file, target)
        return target

    return make


@pytest.fixture
def sharded(folder):
    """A golden folder whose weights are in two files."""
    target = folder("vit-timm")
    state = load_file(target / "model.safetensors")
    places = {key: SHARDS[number % 2] for number, key in enumerate(state)}
    for shard in SHARDS:
        save_file({key: state[key] for key in state if places[key] == shard}, target / shard)
    (target / "model.safetensors").unlink()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


def trees(tmp_path, *sources):
    for number, source in enumerate(sources):
        config = convert_file(source, tmp_path / f"out{number}").config
        yield jax.tree.leaves(load_parameters(tmp_path / f"out{number}", config))


def test_weights_in_several_files(tmp_path, sharded):
    for leaf, other in zip(*trees(tmp_path, BACKBONES / "vit-timm", sharded), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_of_several_kinds_of_files_safetensors_come_first(tmp_path, folder):
    target = folder("vit-timm")
    state = load_file(target / "model.safetensors")
    torch.save({key: torch.from_numpy(each) for key, each in state.items()}, target / "x.bin")
    (target / "x.bin").rename(target / "pytorch_model.bin")
    (target / "open_clip_pytorch_model.bin").write_bytes(b"another one")
    safe = convert_file(target, tmp_path / "safe").source["sha256"]
    (target / "model.safetensors").unlink()
    assert convert_file(target, tmp_path / "bin").source["sha256"] != safe


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda to: (to / SHARDS[1]).unlink(), f"source lacks {SHARDS[1]}, which {INDEX} names"),
        (
            lambda to: (to / SHARDS[1]).write_bytes((to / SHARDS[1]).read_bytes()[:-100]),
            f"{SHARDS[1]} is truncated, damaged, or not a safetensors file",
        ),
        (
            lambda to: shutil.copy(to / SHARDS[0], to / SHARDS[1]),
            "twice, the second time in model-",
        ),
        (
            lambda to: save_file({"other": np.ones(1)}, to / SHARDS[1]),
            f"{SHARDS[1]} lacks .*, which the index names",
        ),
        (lambda to: (to / INDEX).unlink(), "is a folder; of files of weights.* it holds several"),
        (lambda to: (to / INDEX).write_text("{}"), "holds no weight_map"),
        (
            lambda to: (to / INDEX).write_text('{"weight_map": {"a": "../x.safetensors"}}'),
            "names a file outside of its folder: ../x.safetensors",
        ),
    ],
)
def test_damaged_shards(tmp_path, sharded, damage, message):
    damage(sharded)
    with pytest.raises(InputError, match=message):
        convert_file(sharded, tmp_path / "out")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vit-transformers", {"hidden_size": 64}, "config.json says width 64, but .* have 48"),
        ("vit-transformers", {"num_hidden_layers": 4}, "says depth 4, but the arrays .* have 3"),
        ("vit-transformers", {"patch_size": 16}, "says patch_size 16, but the arrays .* have 8"),
        ("vit-transformers", {"num_attention_heads": 7}, "width 48 is not divisible by 7 heads"),
        (
            "vit-transformers",
            {"image_size": 48},
            "26 positions; expected 1 for CLS and 6 x 6 patches as config.json says",
        ),
        (
            "vit-transformers",
            {"model_type": "dinov2"},
            "layout is transformers dinov2, but the keys .* are those of transformers vit",
        ),
        ("vit-transformers", {"model_type": "swin"}, "not a plain vision transformer"),
        (
            "dinov2_with_registers-transformers",
            {"num_register_tokens": 2},
            "registers 2, .* have 4",
        ),
        ("clip-timm", {"architecture": "swin_tiny_patch4_window7_224"}, "not a plain vision tran"),
        ("clip-timm", {"model_args": {"depth": 12}}, "says depth 12, but the arrays .* have 3"),
    ],
)
def test_configs_that_contradict_the_arrays(tmp_path, folder, name, changes, message):
    with pytest.raises(InputError, match=message):
        convert_file(folder(name, **changes), tmp_path / "out")


def test_folder_without_config_leaves_open_what_an_option_settles(tmp_path, folder):
    target = folder("vit-timm")
    (target / "config.json").unlink()
    with pytest.raises(InputError, match="give it with --heads N"):
        convert_file(target, tmp_path / "out")
    description = convert_file(target, tmp_path / "out", heads=3)
    assert (description.config.heads, description.config.norm_eps) == (3, 1e-6)
    assert "norm_eps 1e-06" in description.source["assumed"]


def test_names_of_classes_that_are_too_few_are_left_out_and_that_is_said(tmp_path, folder):
    source = folder("vit-timm", label_names=["crane", "owl"])
    description = convert_file(source, tmp_path / "out")
    outputs = description.config.num_classes
    assert not description.classes
    assert f"2 names of classes, for {outputs} outputs" in description.source["ignored"]


def test_options_win_over_a_config(tmp_path, folder):
    source = folder("vit-timm")
    options = {"heads": 6, "activation": "quickgelu", "preprocessing": "clip"}
    description = convert_file(source, tmp_path / "out", **options)
    assert (description.config.heads, description.config.activation) == (6, "quick_gelu")
    assert description.preprocessing.mean[0] == 0.48145466


ROTARY = {"scaled": True, "classes": 0, "registers": 4, "table": None}
ONES = np.ones((8, 8), np.float32)
BARE = {
    "adapter": ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": ONES}, "adapter such as LoRA"),
    "quantised": ({**timm_state(), "blocks.0.mlp.fc1.weight.absmax": ONES}, "quantised weights"),
    "8 bits": ({**timm_state(), "norm.weight": np.ones(8, np.int8)}, "norm.weight is I8, not fl"),
    "Swin": ({"layers.0.blocks.0.attn.relative_position_bias_table": ONES}, "within windows"),
    "BEiT": ({**timm_state(), "rel_pos_bias.relative_position_bias_table": ONES}, "BEiT, whose"),
    "SAM": ({**timm_state(), "blocks.0.attn.rel_pos_h": ONES}, "attention in windows"),
    "Hiera": ({**timm_state(), "blocks.1.proj.weight": ONES}, "Hiera or MViT"),
    "ResNet": ({"conv1.weight": ONES, "layer1.0.conv1.weight": ONES}, "a convolutional or hier"),
    "parallel": ({**timm_state(), "blocks.0.attns.1.qkv.weight": ONES}, "parallel branches"),
    "norm within attention": (
        {**timm_state(), "blocks.0.attn.norm.weight": ONES},
        "not hold a whole timm model; left over: blocks.0.attn.norm.weight",
    ),
    "patches not square": (
        {**timm_state(), "patch_embed.proj.weight": np.ones((8, 3, 2, 3), np.float32)},
        r"is \(8, 3, 2, 3\), not \(8, 3, 2, 2\); patches must be square",
    ),
    "grey pictures": (
        {**timm_state(), "patch_embed.proj.weight": np.ones((8, 1, 2, 2), np.float32)},
        r"is \(8, 1, 2, 2\), not \(8, 3, 2, 2\)",
    ),
    "head on four blocks": (
        as_dinov2(timm_state(scaled=True, head_width=5)),
        "linear_head.weight .* it reads 5 features",
    ),
    "two norms": (
        {**as_dinov3(timm_state(**ROTARY)), "cls_norm.weight": ONES},
        "a norm for CLS and another one for the patches",
    ),
    "table not square": (timm_state(patches=6), "7 positions; expected 1 for CLS and a square"),
}


@pytest.mark.parametrize("name", BARE)
def test_bare_files_that_are_refused_by_name(tmp_path, name):
    state, message = BARE[name]
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(InputError, match=message):
        convert_file(tmp_path / "in.safetensors", tmp_path / "out", heads=2)
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit_a_bare_file(tmp_path):
    save_file(as_dinov3(timm_state(**ROTARY)), tmp_path / "in.safetensors")
    for options, message in (
        ({"heads": 3}, "width 8 is not divisible by 3 heads"),
        ({"heads": 2, "resolution": 7}, "resolution 7 is not a multiple of the patch size 2; "),
        (
            {"heads": 2, "preprocessing": "clop"},
            "unknown preprocessing 'clop', did you mean 'clip'",
        ),
        ({"activation": "gelu_tan"}, "unknown activation 'gelu_tan', did you mean 'gelu_tanh'"),
        ({"architecture": "vit_base_patch61"}, "unknown model 'vit_base_patch61', did you mean"),
    ):
        with pytest.raises(InputError, match=message):
            convert_file(tmp_path / "in.safetensors", tmp_path / "out", **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused_with_advice(tmp_path, capsys):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-B-32.pt")
    assert main([str(tmp_path / "ViT-B-32.pt"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "TorchScript archive" in error and "torch.jit.load(PATH" in error
    assert error.count("\n") == 1


def test_output_names_licence_pictures_and_what_was_assumed(tmp_path, capsys):
    source = BACKBONES / "dinov2-original" / "dinov2_vits14_pretrain.pth"
    assert main([str(source), str(tmp_path / "bare"), "--heads", "3"]) == 0
    said = capsys.readouterr().out
    assert "assumed     activation gelu, preprocessing of dinov2; --activation, --prepr" in said
    assert (
        "ignored     mask_token\n" in said and "published ones in this layout: Apache-2.0" in said
    )
    assert main([str(BACKBONES / "dinov3-timm"), str(tmp_path / "folder")]) == 0
    said = capsys.readouterr().out
    assert "assumed" not in said and "licence     dinov3-license, also for what is tuned" in said
