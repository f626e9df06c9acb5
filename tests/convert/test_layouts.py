"""One model in several layouts gives one tree, and goes back to each of them."""

import functools
import json

import numpy as np
import pytest
from rich.progress import Progress
from safetensors.numpy import load_file, save_file

from hvit_jax import MODELS, InputError
from hvit_jax.checkpoint import Description
from hvit_jax.convert import convert_file, export_file
from hvit_jax.convert.detect import detect
from hvit_jax.convert.keys import Form
from hvit_jax.convert.reader import read_state_dict
from hvit_jax.convert.switches import Stated
from hvit_jax.convert.tasks import fill_parameters, form_of, to_state
from hvit_jax.models.parameters import flatten
from tests.backbone_states import (
    as_dinov2,
    as_dinov3,
    as_openclip,
    as_transformers_clip,
    as_transformers_dinov2,
    as_transformers_dinov3,
    as_vit,
    renamed,
    split,
    timm_state,
    two_biases,
    without_key_bias,
)
from tests.convert.arrays import assert_same_arrays

PROJECTION = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
IGNORED = (
    *("mask_token", "text_model.", "text.", "logit_", "token_", "ln_final", "positional_"),
    "transformer.",
)
SCALED = {"scaled": True, "classes": 0}
ROTARY = {"scaled": True, "classes": 0, "registers": 4, "table": None}


@pytest.fixture
def read(tmp_path):
    """Read a state dict: the model in it, its tree, and what it gives back."""

    def run(state, **stated):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({key: np.ascontiguousarray(array) for key, array in state.items()}, path)
        silent = Progress(disable=True)
        file = read_state_dict(path, silent)
        known = {name: value for name, value in {"heads": 2, **stated}.items() if value}
        found = detect(file, Stated(known, dict.fromkeys(known, "--option")), silent)
        folder = path.with_suffix("")
        folder.mkdir()
        tree = fill_parameters(file, found, folder)
        form = Form.from_json(found.form.layout, json.loads(json.dumps(found.form.as_json())))
        back = dict(to_state(tree, form, found.config))
        depth = found.config.depth
        return found, flatten(tree), {form.in_file(key, depth): back[key] for key in back}

    return run


def used(source):
    return {key: array for key, array in source.items() if not key.startswith(IGNORED)}


def in_chunks(state):
    names = {r"^blocks\.([01])\.": r"blocks.0.\1.", r"^blocks\.([23])\.": r"blocks.1.\1."}
    return renamed(as_dinov2(state), names)


def in_tower(state):
    tower = {f"visual.trunk.{key}": array for key, array in state.items()}
    text = {"text.transformer.x": np.ones(1, np.float32), "logit_bias": np.ones(1, np.float32)}
    return {**tower, **text, "visual.head.proj.weight": PROJECTION}


DISTILLED = {"tokens": ("cls_token", "dist_token"), "table": 2, "heads": ("head", "head_dist")}
PAIRS = {**SCALED, "classes": 3, "head_width": 2}
GIANT = {**SCALED, "gated": True, "registers": 4}
CLIP = {"pre_norm": True, "classes": 0}
SIGLIP = {"tokens": (), "table": 0, "pool": True, "classes": 0}
mask_token = {"mask_token": np.ones((1, 8), np.float32)}
CASES = {
    "transformers vit": [
        ({}, as_vit),
        ({"classes": 0}, functools.partial(as_vit, root="")),
        (DISTILLED, functools.partial(as_vit, root="deit.", teacher=True)),
    ],
    "DINOv2": [
        (SCALED, lambda state: {**as_dinov2(state), **mask_token}),
        (GIANT, as_dinov2),
        ({**PAIRS, "registers": 2}, as_dinov2),
        ({**SCALED, "registers": 4, "depth": 4}, in_chunks),
    ],
    "transformers dinov2": [
        (PAIRS, as_transformers_dinov2),
        (GIANT, functools.partial(as_transformers_dinov2, root="")),
    ],
    "DINOv3": [
        (ROTARY, as_dinov3),
        ({**ROTARY, "gated": True}, as_dinov3),
        ({**ROTARY, "gated": True, "biases": False}, as_dinov3),
    ],
    "transformers dinov3_vit": [
        (ROTARY, as_transformers_dinov3),
        ({**ROTARY, "gated": True}, as_transformers_dinov3),
        (ROTARY, functools.partial(as_transformers_dinov3, layers="model.layer")),
    ],
    "transformers clip": [
        (CLIP, functools.partial(as_transformers_clip, projection=PROJECTION)),
        (CLIP, functools.partial(as_transformers_clip, root="")),
    ],
    "OpenCLIP": [(CLIP, functools.partial(as_openclip, projection=PROJECTION))],
    "OpenCLIP timm": [({"classes": 0}, in_tower)],
    "transformers siglip": [(SIGLIP, as_transformers_clip)],
}


@pytest.mark.parametrize(
    "layout, number", [(name, number) for name in CASES for number in range(len(CASES[name]))]
)
def test_layouts_of_one_model(read, layout, number):
    options, change = CASES[layout][number]
    state = timm_state(**options)
    state = without_key_bias(state) if "v3" in layout else state
    _, expected, same = read(state)
    assert_same_arrays(same, state)
    source = change(state)
    found, leaves, back = read(source)
    assert found.form.layout.name == layout
    if (projection := leaves.pop("projection/kernel", None)) is not None:
        np.testing.assert_array_equal(projection, PROJECTION.T)
    assert_same_arrays(leaves, expected)
    assert_same_arrays(back, used(source))


def test_ways_of_timm_to_write_one_model(read):
    """As the classes VisionTransformer, Eva with and without one matrix for q, k and v write it."""
    state = without_key_bias(timm_state(**ROTARY, gated=True))
    _, expected, _ = read(state)
    names = {r"\.([qkv])\.(weight|bias)": r".attn.\1_proj.\2", r"\.ls(\d)\.gamma": r".gamma_\1"}
    halves = split(split(state, ["mlp.fc1_g", "mlp.fc1_x"], "mlp.fc1"), ["q", "k", "v"], "attn.qkv")
    apart = {key: each for key, each in renamed(halves, names).items() if "k_proj.bias" not in key}
    for source, variants in (
        (apart, {"fc1_g", "gamma_1", "q_proj"}),
        (two_biases(state), {"q_bias"}),
    ):
        found, leaves, back = read(source)
        assert found.config.qkv_bias == "qv" and found.form.variants == variants
        assert_same_arrays(leaves, expected)
        assert_same_arrays(back, source)


@pytest.mark.parametrize("mask", [(1, 0, 1), (0, 0, 0), (np.nan,) * 3], ids=["usual", "0", "NaN"])
def test_masks_of_dinov3(read, mask):
    state = timm_state(**ROTARY)
    found, leaves, back = read(as_dinov3(state, mask))
    usual = np.repeat(np.float32([1, 0, 1]), 8) * (mask[0] != 0)
    biases = [state[f"blocks.{i}.attn.qkv.bias"] * usual for i in (0, 1)]
    np.testing.assert_array_equal(leaves["blocks/in_proj/bias"], biases)
    assert found.config.qkv_bias == "qv"
    np.testing.assert_array_equal(back["blocks.1.attn.qkv.bias"], biases[1])
    assert back["blocks.1.attn.qkv.bias_mask"].tolist() == usual.tolist()


def test_a_mask_that_keeps_the_keys_bias_is_refused(read):
    with pytest.raises(InputError, match="biases of the keys that are not 0"):
        read(as_dinov3(timm_state(**ROTARY), (1, 1, 1)))


def test_stored_periods_of_rotary_positions_count_and_tell_the_heads(read):
    state = as_dinov3(without_key_bias(timm_state(**ROTARY, width=16)))
    state["rope_embed.periods"] = np.float32([1.0078125, 9.875])
    found, _, back = read(state, heads=None)
    assert (found.config.heads, found.config.rope.periods) == (2, (1.0078125, 9.875))
    assert "heads" not in found.assumed
    assert_same_arrays(back, state)


def test_norms_of_queries_and_keys_tell_the_heads(read):
    found, leaves, _ = read(timm_state(qk_norm=4), heads=None)
    assert found.config.heads == 2 and found.config.qk_norm
    assert leaves["blocks/q_norm/scale"].shape == (2, 4)
    with pytest.raises(InputError, match="--option says heads 4, of 2 channels.*have heads of 4"):
        read(timm_state(qk_norm=4), heads=4)


@pytest.mark.parametrize("width, gated, heads", [(1280, False, 16), (1280, True, 20)])
def test_heads_that_are_usual_for_a_width(read, width, gated, heads):
    """DINOv3's H+ has another number than other models of its width, whoever wrote the file."""
    found, _, _ = read(timm_state(width=width, depth=1, gated=gated), heads=None)
    assert (found.config.heads, found.assumed["heads"]) == (heads, f"{heads} heads")


def test_patches_of_siglip_as_a_linear_layer(read):
    source = as_transformers_clip(timm_state(**SIGLIP))
    _, expected, _ = read(source)
    key = "vision_model.embeddings.patch_embedding.weight"
    source[key] = source[key].transpose(0, 2, 3, 1).reshape(8, -1)
    _, leaves, back = read(source)
    assert_same_arrays(leaves, expected)
    np.testing.assert_array_equal(back[key], source[key])


@pytest.mark.parametrize("registers, prefix", [(0, 0), (0, 1), (4, 0), (4, 1), (4, 5)])
def test_tokens_that_the_table_of_positions_covers(read, registers, prefix):
    config = read(timm_state(table=prefix, registers=registers, patches=16))[0].config
    assert (config.position_prefix, config.image_shape) == (prefix, (8, 8))


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"activation": "gelu", "norm_eps": 1e-6, "pool": "cls"}),
        ({"norm": "fc_norm"}, {"pool": "avg", "final_norm": False, "pooled_norm": True}),
        (SIGLIP, {"activation": "gelu_tanh", "pool": "map", "norm_eps": 1e-6}),
        ({"pre_norm": True}, {"activation": "gelu", "norm_eps": 1e-5, "patch_bias": False}),
        (ROTARY, {"norm_eps": 1e-5, "pool": "avg", "image_shape": (224, 224)}),
        ({"gated": True}, {"activation": "silu", "mlp_width": 12}),
        ({"biases": False}, {"qkv_bias": "none"}),
    ],
)
def test_switches_of_bare_files_of_timm(read, options, expected):
    found = read(timm_state(**options))[0]
    assert {name: getattr(found.config, name) for name in expected} == expected
    assert ("resolution" in found.assumed) == ("image_shape" in expected)


def test_an_architecture_tells_what_no_key_does(read, tmp_path):
    """EVA02 has rotary positions, which no key of a bare file shows."""
    sizes = {"width": 192, "mlp": 512, "patch": 14, "patches": 16, "depth": 12}
    state = without_key_bias(timm_state(**sizes, norm="fc_norm", gated=True))
    for part in [f"{i}.mlp.norm.{each}" for i in range(12) for each in ("weight", "bias")]:
        state[f"blocks.{part}"] = np.zeros(512, np.float32)
    save_file(state, tmp_path / "eva.safetensors")
    with pytest.raises(InputError, match="rotary positions; say which .* --architecture NAME"):
        convert_file(tmp_path / "eva.safetensors", tmp_path / "out")
    convert = functools.partial(convert_file, tmp_path / "eva.safetensors", tmp_path / "eva")
    with pytest.raises(InputError, match="vit_tiny_patch16_224 says mlp_width 768, .* have 512"):
        convert(architecture="vit_tiny_patch16_224")
    config = convert(architecture="eva02_tiny_patch14_224").config
    assert (config.heads, config.rope.reference, config.pool) == (3, (16, 16), "avg")


def test_what_no_model_needs_is_passed_over_and_named(read):
    """MAE's decoder, DINO's head, buffers and counters; in any layout."""
    beside = {
        "mask_token": (1, 1, 8),
        "decoder_embed.weight": (4, 8),
        "decoder_blocks.0.norm1.weight": (4,),
        "head.mlp.0.weight": (4, 8),
        "rope.freqs_cos": (4, 4),
        "norm.num_batches_tracked": (),
    }
    state = {f"backbone.{key}": each for key, each in timm_state(classes=0).items()}
    more = {key: np.ones(shape, np.float32) for key, shape in beside.items()}
    found, _, back = read({**state, **more})
    assert_same_arrays(back, state)
    names = ("mask_token", "decoder_* (2 keys)", "norm.num_batches_tracked", "rope.freqs_cos")
    assert set(found.ignored) == {*names, "head.mlp.0.weight"}


def test_a_deep_text_tower_is_no_tower_of_pictures(read):
    source = as_openclip(timm_state(**CLIP), PROJECTION)
    deep = {
        key.removeprefix("visual.").replace("resblocks.0.", f"resblocks.{i}."): array
        for key, array in source.items()
        for i in range(6)
        if key.startswith("visual.transformer.resblocks.0.")
    }
    assert read({**source, **deep})[0].config.depth == 2
    tower = {**in_tower(timm_state(classes=0)), **deep, "positional_embedding": np.ones((2, 8))}
    assert read(tower)[0].form.layout.name == "OpenCLIP timm"


@pytest.mark.parametrize("own", [True, False])
def test_openais_own_clip_has_the_quick_gelu(read, own):
    source = as_openclip(timm_state(**CLIP), PROJECTION)
    more = {"input_resolution": np.ones(()), "context_length": np.ones(())}
    config = read({**source, **(more if own else {})})[0].config
    assert config.activation == ("quick_gelu" if own else "gelu")


def test_written_in_the_layout_of_another_library(tmp_path):
    state = without_key_bias(timm_state(**ROTARY, gated=True))
    save_file(two_biases(state), tmp_path / "timm.safetensors")
    convert_file(tmp_path / "timm.safetensors", tmp_path / "timm", heads=2)
    for name, change in (
        ("timm", two_biases),
        ("dinov3", as_dinov3),
        ("transformers-dinov3_vit", as_transformers_dinov3),
    ):
        export_file(tmp_path / "timm", tmp_path / f"{name}-out.safetensors", layout=name)
        assert_same_arrays(load_file(tmp_path / f"{name}-out.safetensors"), change(state))
    for name, reason in (("swag", "blocks/ls_1"), ("openclip", "register_tokens")):
        with pytest.raises(InputError, match=f"has no place for: .*{reason}"):
            export_file(tmp_path / "timm", tmp_path / "no.safetensors", layout=name)


def test_a_tuned_model_goes_back_to_the_layout_that_it_began_from():
    begun = {"format": "DINOv2", "form": {"names": {"root": "backbone."}, "chunks": 2}}
    tuned = {"format": "hvit train", "method": "tome", "begun": begun}
    config = MODELS["vit_b16"]
    for source, expected in (
        (begun, "DINOv2"),
        (tuned, "DINOv2"),
        ({**tuned, "begun": tuned}, "DINOv2"),
        ({}, "SWAG"),
        ({"format": "hvit train"}, "SWAG"),
    ):
        assert form_of(Description(config, source), None).layout.name == expected
    assert form_of(Description(config, tuned), None).as_json() == begun["form"]
    assert form_of(Description(config, tuned), "timm").layout.name == "timm"
