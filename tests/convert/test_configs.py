"""What config files of timm, transformers and OpenCLIP say, and which models they are not."""

import json
from pathlib import Path

import pytest

from hvit_jax.architectures import architecture_config
from hvit_jax.convert.configs import read_facts
from hvit_jax.convert.families import FAMILIES, without_rest
from hvit_jax.convert.layouts import LAYOUTS
from hvit_jax.convert.licences import licence_line
from hvit_jax.errors import InputError
from hvit_jax.pictures import MEAN, STD, Preprocessing


def facts(folder: Path, config=None, **files):
    """Read facts of a folder with these JSON files; a name's dots are double underscores."""
    written = {"config": config, **files}
    for name, content in written.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return read_facts(folder)


TIMM = {
    "architecture": "vit_small_patch14_reg4_dinov2",
    "num_classes": 0,
    "num_features": 48,
    "global_pool": "token",
    "pretrained_cfg": {
        "input_size": [3, 35, 70],
        "interpolation": "bilinear",
        "crop_mode": "squash",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.1, 0.3],
        "license": "apache-2.0",
    },
}


def test_timm_without_model_args(tmp_path):
    """Switches come from the architecture, sizes from what the file repeats, or from shapes."""
    read = facts(tmp_path, TIMM)
    assert read.layout == "timm" and read.licence == "apache-2.0"
    expected = {"heads": 6, "registers": 4, "layer_scale": True, "position_prefix": 0, "width": 48}
    expected |= {"pool": "cls", "norm_eps": 1e-6, "resolution": (35, 70), "num_classes": 0}
    assert expected.items() <= read.switches.items()
    assert not {"depth", "patch_size", "mlp_width"} & read.switches.keys()
    assert read.preprocessing == Preprocessing(
        crop_pct=0.875,
        crop_mode="squash",
        rounding="timm",
        interpolation="bilinear",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.1, 0.3),
    )
    assert read.input_size is None


def test_timm_model_args_and_classes(tmp_path):
    config = {
        **TIMM,
        "architecture": "vit_base_patch16_224",
        "global_pool": "avg",
        "label_names": ["crane", "owl", "crane"],
        "model_args": {"num_heads": 3, "depth": 2, "img_size": 48, "patch_size": 8},
    }
    read = facts(tmp_path, config)
    expected = {"heads": 3, "depth": 2, "patch_size": 8, "resolution": (48, 48), "pool": "avg"}
    assert expected.items() <= read.switches.items()
    assert not {"final_norm", "pooled_norm"} & read.switches.keys()  # Keys tell.
    assert read.input_size == (35, 70)  # Pictures come in another size than the model's own.
    assert read.classes == ("crane (0)", "owl", "crane (2)")
    del config["pretrained_cfg"]
    assert facts(tmp_path, config).preprocessing is None  # It is assumed then, which is said.


def test_timm_without_any_norm_after_the_blocks(tmp_path):
    read = facts(tmp_path, {**TIMM, "architecture": "vit_intern300m_patch14_448"})
    assert {"final_norm": False, "pooled_norm": False}.items() <= read.switches.items()


def test_timm_names_of_the_folder(tmp_path):
    config = {**TIMM, "architecture": "swin_tiny_patch4_window7_224"}
    with pytest.raises(InputError, match="swin.* its attention is within windows"):
        facts(tmp_path, config)
    with pytest.raises(InputError, match="vit_base_patch16_xp_224 cannot be built; it needs"):
        facts(tmp_path, {**TIMM, "architecture": "vit_base_patch16_xp_224"})
    with pytest.raises(InputError, match="did you mean vit_small_patch14_reg4_dinov2"):
        facts(tmp_path, {**TIMM, "architecture": "vit_small_patch14_reg5_dinov2"})
    with pytest.raises(InputError, match="width 48 is not divisible by 7 heads"):
        facts(tmp_path, {**TIMM, "model_args": {"num_heads": 7}})
    with pytest.raises(InputError, match="the argument surprise"):
        facts(tmp_path, {**TIMM, "model_args": {"surprise": 1}})


@pytest.mark.parametrize(
    ("config", "switches"),
    [
        ({"model_type": "vit"}, {"heads": 12, "norm_eps": 1e-12, "activation": "gelu"}),
        ({"model_type": "vit", "qkv_bias": False}, {"qkv_bias": "none", "pool": "cls"}),
        (
            {"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]},
            {"pool": "two heads", "distillation_token": True, "position_prefix": 2},
        ),
        (
            {"model_type": "deit", "architectures": ["DeiTForImageClassification"]},
            {"pool": "cls", "distillation_token": True},
        ),
        ({"model_type": "vit_mae", "image_size": [32, 48]}, {"resolution": (32, 48)}),
        (
            {"model_type": "dinov2", "architectures": ["Dinov2ForImageClassification"]},
            {"pool": "cls+avg", "norm_eps": 1e-6, "position_resizing": "bicubic"},
        ),
        (
            {"model_type": "dinov2", "use_swiglu_ffn": True},
            {"gated": True, "activation": "silu", "layer_scale": True},
        ),
        (
            {"model_type": "dinov2_with_registers", "num_register_tokens": 2},
            {"position_resizing": "bicubic_antialias", "registers": 2},
        ),
        ({"model_type": "dinov3_vit"}, {"heads": 6, "qkv_bias": "qv", "norm_eps": 1e-5}),
        (
            {"model_type": "dinov3_vit", "query_bias": False, "value_bias": False},
            {"qkv_bias": "none", "position_embedding": False},
        ),
        (
            {"model_type": "clip", "vision_config": {}},
            {"activation": "quick_gelu", "norm_eps": 1e-5, "pre_norm": True, "patch_bias": False},
        ),
        (
            {"model_type": "clip", "architectures": ["CLIPForImageClassification"]},
            {"pool": "avg", "pool_before_norm": True},
        ),
        ({"model_type": "clip_vision_model", "hidden_act": "gelu"}, {"activation": "gelu"}),
        (
            {"model_type": "siglip", "vision_config": {}},
            {"pool": "map", "activation": "gelu_tanh", "class_token": False, "position_prefix": 0},
        ),
        (
            {"model_type": "siglip", "architectures": ["SiglipForImageClassification"]},
            {"pool": "avg"},
        ),
        (
            {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 36},
            {"resolution": (48, 48), "position_resizing": "bilinear_antialias"},
        ),
    ],
)
def test_transformers_switches_and_what_is_left_out(tmp_path, config, switches):
    assert switches.items() <= facts(tmp_path, config).switches.items()


def test_transformers_periods(tmp_path):
    config = {"model_type": "dinov3_vit", "hidden_size": 32, "num_attention_heads": 2}
    rope = facts(tmp_path, config).switches["rope"]
    assert rope.periods == pytest.approx((1, 100**0.25, 100**0.5, 100**0.75))
    config["rope_parameters"] = {"rope_theta": 16.0}
    assert facts(tmp_path, config).switches["rope"].periods == pytest.approx((1, 2, 4, 8))


def test_transformers_classes(tmp_path):
    config = {"model_type": "vit", "id2label": {"10": "owl", "2": "crane", "1": "hen"}}
    assert facts(tmp_path, config).classes == ("hen", "crane", "owl")
    assert "num_classes" not in facts(tmp_path, config).switches  # It may have no head.
    config["architectures"] = ["ViTForImageClassification"]
    assert facts(tmp_path, config).switches["num_classes"] == 3
    config["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    found = facts(tmp_path, config)
    assert found.classes == () and found.switches["num_classes"] == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, "'swin' is not a plain vision transformer: its attention is with"),
        ({"model_type": "hiera"}, "its attention is within windows"),
        ({"model_type": "beit"}, "its positions are biases of the attention"),
        ({"model_type": "llava"}, "'llava' is not read; these are: vit, deit, vit_mae, dinov2"),
        ({"hidden_size": 3}, "names neither an architecture of timm nor a model_type"),
        ({"model_type": "vit", "quantization_config": {"bits": 4}}, "weights are quantised"),
        ({"model_type": "vit", "hidden_act": "relu"}, "the activation 'relu' is not read"),
        ({"model_type": "vit", "num_channels": 1}, "have 1 channels, not 3"),
        ({"model_type": "vit", "patch_size": [16, 8]}, r"patches are not square: \[16, 8\]"),
        ({"model_type": "vit", "architectures": ["ViTForDepth"]}, "class ViTForDepth is not read"),
        ({"model_type": "dinov3_vit", "key_bias": 1, "query_bias": 0}, "q and v must both"),
        ({"model_type": "clip", "vision_config": 3}, "is damaged: AttributeError"),
        ({"model_type": "vit", "num_attention_heads": "12"}, "is damaged: TypeError"),
        ({"model_type": "dinov3_vit", "num_attention_heads": 0}, "is damaged: ZeroDivisionError"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": [1]}, "is damaged: TypeError"),
    ],
)
def test_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        facts(tmp_path, config)


def test_adapters_and_folders_without_files(tmp_path):
    assert read_facts(tmp_path) is None
    with pytest.raises(InputError, match="an adapter such as LoRA"):
        facts(tmp_path, adapter_config={"peft_type": "LORA"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is not JSON"):
        read_facts(tmp_path)


def test_licence_of_a_model_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\ntags:\n- x\nlicense: other\nlicense_name: dinov3\n---\n"
    )
    assert facts(tmp_path, {"model_type": "vit"}).licence == "dinov3"


SIZES = {"image_size": 48, "patch_size": 8}


@pytest.mark.parametrize(
    ("kind", "processor", "expected", "size"),
    [
        (
            "vit",
            {},
            Preprocessing(1.0, "squash", "transformers", "bilinear", *[(0.5,) * 3] * 2),
            224,
        ),
        (
            "clip_vision_model",
            {"size": 60, "crop_size": 48, "image_mean": list(MEAN), "image_std": list(STD)},
            Preprocessing(0.8, "center", "transformers"),
            None,
        ),
        (
            "dinov2",
            {"size": {"shortest_edge": 256}, "image_mean": list(MEAN), "image_std": list(STD)},
            Preprocessing(0.875, "center", "transformers"),
            224,
        ),
        (
            "deit",
            {"size": 64, "crop_size": 48, "resample": 0, "do_normalize": False},
            Preprocessing(0.75, "squash", "transformers", "nearest", (0.0,) * 3, (1.0,) * 3),
            None,
        ),
        (
            "siglip2_vision_model",
            {"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3},
            Preprocessing(1.0, "squash", "transformers", "bilinear", (0.5,) * 3, (0.25,) * 3),
            None,
        ),
    ],
)
def test_transformers_preprocessing(tmp_path, kind, processor, expected, size):
    config = {"model_type": kind, **SIZES, "num_patches": 36}
    read = facts(tmp_path, config, preprocessor_config={"do_resize": True, **processor})
    assert read.preprocessing == expected
    assert read.input_size == (size and (size, size))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 5}, "resample 5 is not one of"),
        ({"size": {"longest_edge": 9}}, "names neither height and width nor shortest_edge"),
        ({"size": 24, "crop_size": 32, "do_center_crop": True}, "is larger than size"),
    ],
)
def test_preprocessing_that_cannot_be_followed(tmp_path, processor, message):
    with pytest.raises(InputError, match=f"preprocessor_config.json: .*{message}"):
        facts(tmp_path, {"model_type": "vit"}, preprocessor_config=processor)


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 40, "layers": 3, "width": 64, "head_width": 16},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
}


def test_open_clip(tmp_path):
    read = facts(tmp_path, open_clip_config=OPEN_CLIP)
    expected = {"heads": 4, "projection": 24, "norm_eps": 1e-5, "activation": "gelu", "depth": 3}
    assert expected.items() <= read.switches.items()
    assert read.layout == "OpenCLIP"
    assert read.preprocessing == Preprocessing(crop_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3)


def test_open_clip_with_a_tower_of_timm(tmp_path):
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "image_size": 256}
    model = {"embed_dim": 768, "vision_cfg": {**vision, "timm_pool": "map", "timm_proj": "none"}}
    read = facts(tmp_path, open_clip_config={"model_cfg": model})
    assert read.layout == "timm"
    expected = {"pool": "map", "resolution": (256, 256), "num_classes": 0, "projection": 0}
    assert expected.items() <= read.switches.items()
    vision["timm_proj"] = "linear"
    model["vision_cfg"] = vision
    read = facts(tmp_path, open_clip_config={"model_cfg": model})
    assert read.switches["projection"] == 768


def test_open_clip_refused(tmp_path):
    for changed, message in (
        ({"layers": [2, 2, 2, 2]}, "is a ResNet"),
        ({"attentional_pool": True}, "CoCa"),
        ({"pool_type": "none"}, "pool_type 'none' is not read"),
        ({"timm_model_name": "vit_base_patch16_224", "timm_proj": "mlp"}, "timm_proj 'mlp'"),
    ):
        vision = {**OPEN_CLIP["model_cfg"]["vision_cfg"], **changed}
        content = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision}}
        with pytest.raises(InputError, match=message):
            facts(tmp_path, open_clip_config=content)


def test_what_no_whole_patch_covers():
    """SigLIP SO400M's 384 pixels in patches of 14."""
    config = architecture_config("vit_so400m_patch14_siglip_384")
    assert without_rest(Preprocessing(), (384, 384), config).uncovered == (6, 6)
    assert without_rest(Preprocessing(), (378, 378), config).uncovered == (0, 0)
    assert without_rest(Preprocessing(), (512, 512), config).uncovered == (0, 0)


def test_bare_files():
    assert FAMILIES["CLIP"].mean == (0.48145466, 0.4578275, 0.40821073)
    assert FAMILIES["SigLIP"].std == (0.5, 0.5, 0.5)
    assert FAMILIES["DINOv3 sat493m"].mean == (0.43, 0.411, 0.296)
    assert FAMILIES["DINOv2"].mean == MEAN


def test_licences():
    assert licence_line("mit", "timm") == "mit, also for what is tuned from these weights"
    lines = {layout.name: licence_line(None, layout.name) for layout in LAYOUTS}
    assert "CC-BY-NC 4.0 for MAE's" in lines["transformers vit"]
    assert lines["torchvision"] == lines["torchvision (older)"]
