"""Small models of timm, transformers and OpenCLIP with random weights, converted and compared.

They take the variants that the golden folders do not have. The libraries are in the extra
`parity`; without them these tests are skipped.
"""

import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

import hvit_jax
from hvit_jax.convert import convert_file

torch = pytest.importorskip("torch", reason="needs PyTorch (the extra convert)")
SIDE, PATCH = 40, 8
OTHER = (48, 64)
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": PATCH, "img_size": SIDE}
# Names of timm, and what of the small sizes is different.
TIMM = {
    "deit_base_distilled_patch16_224": {},
    "eva02_small_patch14_224": {},
    "eva02_base_patch14_448": {},
    "eva_large_patch14_196": {},
    "flexivit_small": {},
    "test_vit2": {"num_classes": 3},
    "test_vit3": {},
    "vit_7b_patch16_dinov3": {},
    "vit_base_patch16_224": {"qk_norm": True, "num_classes": 5},
    "vit_base_patch16_rope_224": {},
    "vit_base_patch16_rope_ape_224": {},
    "vit_base_patch16_rope_reg1_gap_256": {},
    "vit_base_patch16_siglip_gap_256": {},
    "vit_giant_patch14_dinov2": {},
    "vit_intern300m_patch14_448": {},
    "vit_medium_patch16_gap_256": {},
    "vit_pe_core_gigantic_patch14_448": {"attn_pool_num_heads": 4},
    "vit_pe_spatial_base_patch16_512": {},
    "vit_so150m2_patch16_reg1_gap_256": {},
}


def loud(model):
    """Draw weights under which every part of a model shows in its output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.ndim > 1:
                each.normal_(std=min(1.0, 2 / each[0].numel() ** 0.5), generator=generator)
            elif "bias" in name:
                each.normal_(std=0.2, generator=generator)
            else:
                each.uniform_(0.4, 1.4, generator=generator)
    return model.eval()


def pictures(height, width):
    return np.random.default_rng(0).normal(size=(2, 3, height, width)).astype(np.float32)


def compare(folder, run, sizes):
    """Convert a folder, and compare outputs with those of the library's `run` at some sizes."""
    convert_file(folder, folder.parent / "converted")
    for size in sizes:
        images = pictures(*size)
        with torch.no_grad():
            expected = run(torch.from_numpy(images), size).numpy()
        model = hvit_jax.load(folder.parent / "converted", resolution=size)
        output = model(jnp.asarray(images.transpose(0, 2, 3, 1)))
        np.testing.assert_allclose(output, expected, atol=5e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", TIMM)
def test_timm(tmp_path, name):
    timm = pytest.importorskip("timm", reason="needs timm (the extra parity)")
    model_args = {**SMALL, **TIMM[name]}
    torch.manual_seed(0)
    model = loud(timm.create_model(name, **model_args))
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": model_args,
        "pretrained_cfg": {**model.pretrained_cfg, "input_size": [3, SIDE, SIDE]},
    }
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")

    state = model.state_dict()

    def run(images, size):
        """Load the weights into a model of this size, as timm does with published ones."""
        resized = timm.create_model(name, **{**model_args, "img_size": size}).eval()
        flexible = {"interpolation": "bilinear", "antialias": False} if "flexi" in name else {}
        module = importlib.import_module(type(model).__module__)
        fitted = module.checkpoint_filter_fn(dict(state), resized, **flexible)
        resized.load_state_dict(fitted)
        return resized(images)

    compare(folder, run, [(SIDE, SIDE), OTHER])


SIZES = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3},
    **{"intermediate_size": 96, "image_size": SIDE, "patch_size": PATCH},
}
RATIO = {**SIZES, "mlp_ratio": 2}
# Classes of transformers, options of their configurations, and which of their outputs is compared.
TRANSFORMERS = {
    "ViTForImageClassification": ({**SIZES, "hidden_act": "gelu_new"}, "logits"),
    "ViTModel": ({**SIZES, "qkv_bias": False}, "cls"),
    "ViTMAEModel": ({**SIZES, "mask_ratio": 0.0}, "cls"),
    "DeiTModel": (SIZES, "cls"),
    "DeiTForImageClassification": (SIZES, "logits"),
    "DeiTForImageClassificationWithTeacher": (SIZES, "logits"),
    "Dinov2Model": ({**RATIO, "use_swiglu_ffn": True}, "cls"),
    "Dinov2WithRegistersForImageClassification": (RATIO, "logits"),
    "DINOv3ViTModel": (
        {**SIZES, "use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 3},
        "cls",
    ),
    "DINOv3ViTModel without biases": (
        {**SIZES, "query_bias": False, "value_bias": False, "num_register_tokens": 1},
        "cls",
    ),
    "CLIPVisionModel": (SIZES, "pooler_output"),
    "CLIPVisionModelWithProjection": ({**SIZES, "projection_dim": 20}, "image_embeds"),
    "CLIPForImageClassification": (SIZES, "logits"),
    "SiglipVisionModel": (SIZES, "pooler_output"),
    "SiglipForImageClassification": (SIZES, "logits"),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    options, output = TRANSFORMERS[name]
    kind = getattr(transformers, name.partition(" ")[0])
    of_vision = kind in (
        transformers.CLIPForImageClassification,
        transformers.SiglipForImageClassification,
    )
    options = {"vision_config": options} if of_vision else options
    model = loud(kind(kind.config_class(**options, num_labels=4)))
    folder = tmp_path / "source"
    model.save_pretrained(folder)
    asked = (
        {"interpolate_pos_encoding": True}
        if name.startswith(("ViTM", "ViTF", "De", "C", "S"))
        else {}
    )

    def run(images, size):
        found = model(pixel_values=images, **asked)
        return found.last_hidden_state[:, 0] if output == "cls" else found[output]

    compare(folder, run, [(SIDE, SIDE), OTHER])


def test_transformers_siglip2_naflex(tmp_path):
    """SigLIP 2 NaFlex takes patches, as many rows and columns as the picture has."""
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    sizes = {name: size for name, size in SIZES.items() if name != "image_size"}
    config = transformers.Siglip2VisionConfig(**sizes, num_patches=(SIDE // PATCH) ** 2)
    model = loud(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path / "source")

    def run(images, size):
        rows, columns = (side // PATCH for side in size)
        cells = images.reshape(2, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1)
        return model(
            cells.reshape(2, rows * columns, -1),
            pixel_attention_mask=torch.ones(2, rows * columns, dtype=torch.int32),
            spatial_shapes=torch.tensor([[rows, columns]] * 2),
        ).pooler_output

    compare(tmp_path / "source", run, [(SIDE, SIDE), OTHER])


TOWER = {"image_size": SIDE, "patch_size": PATCH, "width": 48, "layers": 2, "head_width": 16}
TIMM_TOWER = {"timm_model_name": "test_vit", "image_size": 160}
# Towers of OpenCLIP, and options beside them.
OPEN_CLIP = {
    "usual": (TOWER, {}),
    "quick": (TOWER, {"quick_gelu": True}),
    "mean": ({**TOWER, "pool_type": "avg", "final_ln_after_pool": True, "ls_init_value": 0.5}, {}),
    "eps": ({**TOWER, "no_ln_pre": True, "norm_kwargs": {"eps": 0.01}, "mlp_ratio": 2.0}, {}),
    "tower": ({**TIMM_TOWER, "timm_pool": "avg", "timm_proj": "linear"}, {}),
    "tower with a head": ({**TIMM_TOWER, "timm_pool": "token", "timm_proj": None}, {}),
    "tower alone": ({**TIMM_TOWER, "timm_pool": "map", "timm_proj": "none"}, {}),
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(tmp_path, name):
    open_clip = pytest.importorskip("open_clip", reason="needs the extra parity")
    vision, more = OPEN_CLIP[name]
    outputs = 64 if name == "tower alone" else 20
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    settings = {"embed_dim": outputs, "vision_cfg": vision, "text_cfg": text, **more}
    model = loud(open_clip.model.CLIP(**settings))
    folder = tmp_path / "source"
    folder.mkdir()
    content = {"model_cfg": settings, "preprocess_cfg": {"size": vision["image_size"]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    compare(folder, lambda images, size: model.encode_image(images), [(vision["image_size"],) * 2])
