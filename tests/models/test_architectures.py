"""Models by name: their switches, their sizes against other libraries' counts, and full shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import hvit_jax
from hvit_jax.architectures import (
    MODELS,
    architecture_config,
    architectures,
    buildable,
    model_name,
    named_config,
    other_cards,
    published_parameters,
    weights_of,
    why_not,
)
from hvit_jax.config import ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import abstract_parameters, count_parameters
from hvit_jax.reducers import Reducer


def test_all_but_those_that_need_more_can_be_built():
    """The specification says 197: it counts two that need no more than these switches otherwise."""
    assert len(architectures()) == 244 and len(buildable()) == 196
    for name in buildable():
        config = architecture_config(name)
        rule = "bilinear" if "flexivit" in name else "bicubic_antialias"
        assert config.position_resizing == rule
        # SigLIP's patches of 14 leave 6 of 384 pixels.
        rest = [
            theirs - ours
            for theirs, ours in zip(weights_of(name)[0].resolution, config.image_shape, strict=True)
        ]
        assert rest == ([6, 6] if "patch14_siglip" in name and "384" in name else [0, 0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("aimv2_1b_patch14_224", "RMSNorm"),
        ("beit3_base_patch16_224", "a norm within attention, a norm within the MLP"),
        ("eva02_base_patch16_clip_224", "a norm within attention"),
        ("eva02_enormous_patch14_clip_224", "norms after each branch"),
        ("vit_base_patch16_18x2_224", "parallel branches"),
        ("vit_base_patch16_rope_mixed_224", "rotary positions of the kind 'mixed'"),
        ("vit_base_patch16_sapiens2", "fewer heads for keys and values than for queries"),
        ("vit_base_patch16_xp_224", "RMSNorm"),
        ("vit_dwee_patch16_reg1_gap_256", "differential attention"),
        ("vit_large_patch16_radio_v3", "RADIO"),
    ],
)
def test_why_others_cannot(name, reason):
    assert why_not(name).startswith(f"{name} cannot be built; it needs ")
    assert reason in why_not(name)


# Names and the switches in which they differ from SWAG's model of their sizes.
SWITCHES = {
    "vit_base_patch16_224": {},
    "vit_base_patch14_dinov2": {"layer_scale": True, "num_classes": 0},
    "vit_base_patch14_reg4_dinov2": {
        **{"layer_scale": True, "num_classes": 0, "registers": 4, "position_prefix": 0}
    },
    "vit_giant_patch14_dinov2": {
        **{"layer_scale": True, "num_classes": 0, "gated": True, "activation": "silu"}
    },
    "deit3_small_patch16_224": {"layer_scale": True, "position_prefix": 0},
    "deit_tiny_distilled_patch16_224": {
        **{"distillation_token": True, "position_prefix": 2, "pool": "two heads"}
    },
    "vit_base_patch32_clip_quickgelu_224.openai": {
        **{"pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "activation": "quick_gelu"},
        "num_classes": 512,
    },
    "vit_base_patch16_siglip_224": {
        **{"class_token": False, "position_prefix": 0, "pool": "map", "num_classes": 0}
    },
    "vit_base_patch32_siglip_gap_256": {
        **{"class_token": False, "position_prefix": 0, "pool": "avg", "num_classes": 0},
        "activation": "gelu_tanh",
    },
    "vit_medium_patch16_gap_256": {
        **{"class_token": False, "position_prefix": 0, "pool": "avg", "qkv_bias": "none"},
        "layer_scale": True,
    },
    "vit_medium_patch16_reg4_gap_256": {
        **{"class_token": False, "registers": 4, "position_prefix": 0, "layer_scale": True},
        **{"pool": "avg", "final_norm": False, "pooled_norm": True},
    },
    "test_vit2": {
        **{"class_token": False, "registers": 1, "layer_scale": True},
        **{"pool": "avg", "final_norm": False, "pooled_norm": True},
    },
    "test_vit3": {
        **{"class_token": False, "registers": 1, "layer_scale": True},
        **{"pool": "map", "pool_prefix": True},
    },
    "vit_intern300m_patch14_448": {"layer_scale": True, "final_norm": False, "num_classes": 0},
    "eva_large_patch14_196": {"pool": "avg", "final_norm": False, "pooled_norm": True},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(name):
    config = architecture_config(name)
    plain = ViTConfig(
        config.resolution,
        config.patch_size,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        mlp_width=config.mlp_width,
        position_resizing="bicubic_antialias",
    )
    assert config == dataclasses.replace(plain, **SWITCHES[name])


def test_rotary_models():
    """DINOv3, EVA02 and PE, whose sizes and coordinates follow rules of their own."""
    huge = architecture_config("vit_huge_plus_patch16_dinov3_qkvb")
    assert (huge.heads, huge.mlp_width, huge.registers, huge.qkv_bias) == (20, 5120, 4, "qv")
    assert huge.rope == hvit_jax.config.Rope.spaced(64) and not huge.position_embedding
    assert (huge.pool, huge.final_norm, huge.pooled_norm) == ("avg", True, False)
    eva = architecture_config("eva02_large_patch14_448")
    assert (eva.mlp_width, eva.mlp_norm, eva.qkv_bias) == (2730, True, "qv")
    assert (eva.final_norm, eva.pooled_norm, eva.position_prefix) == (False, True, 1)
    assert eva.rope.periods == pytest.approx([10000 ** (k / 16) for k in range(16)])
    assert (eva.rope.coordinates, eva.rope.interleaved) == ("grid", True)
    assert (eva.rope.reference, eva.rope.offset, eva.rope.first_axis) == ((16, 16), 0, "y")
    pe = architecture_config("vit_pe_core_large_patch14_336")
    assert (pe.rope.reference, pe.rope.offset, pe.rope.first_axis) == ((24, 24), 1, "x")
    assert (pe.pool, pe.pool_heads, pe.pool_prefix, pe.qkv_bias) == ("map", 8, True, "all")
    gigantic = architecture_config("vit_pe_core_gigantic_patch14_448")
    assert (gigantic.mlp_width, gigantic.pool_mlp_width, gigantic.class_token) == (
        8960,
        6144,
        False,
    )
    assert architecture_config("vit_base_patch16_rope_224").rope.reference is None


def test_arguments_of_a_config_file():
    config = architecture_config(
        "vit_base_patch16_clip_224", img_size=[32, 48], patch_size=8, num_heads=4, num_classes=3
    )
    assert (config.image_shape, config.heads, config.num_classes) == ((32, 48), 4, 3)
    config = architecture_config("vit_base_patch16_224", global_pool="avg", fc_norm=False)
    assert (config.pool, config.final_norm, config.pooled_norm) == ("avg", True, False)
    config = architecture_config("vit_base_patch16_224", qk_norm=True, pos_embed="none")
    assert config.qk_norm and not config.position_embedding
    assert architecture_config("vit_base_patch16_224", resolution=96).image_shape == (96, 96)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_base_patch14_dinov3", {}, "did you mean vit_base_patch16_dinov3"),
        ("vit_b16", {}, "unknown model 'vit_b16'"),
        ("vit_base_patch16_224.dinov2", {}, "has no weights named 'dinov2'; it has augreg2"),
        ("vit_base_patch16_224", {"num_heads": 7}, "width 768 is not divisible by 7 heads"),
        ("vit_base_patch16_224", {"global_pool": "max"}, "it needs global_pool 'max'"),
        ("vit_base_patch16_224", {"act_layer": "relu"}, "it needs the activation relu"),
        ("vit_base_patch16_224", {"in_chans": 1}, "pictures of other than three channels"),
        ("vit_base_patch16_224", {"colour": 1}, "it needs the argument colour"),
        ("vit_base_patch16_224", {"resolution": 100}, "resolution 100 is not a multiple"),
        ("vit_base_patch16_224", {"class_token": False}, "pool 'cls' needs class_token"),
    ],
)
def test_what_is_refused(name, arguments, message):
    with pytest.raises(InputError, match=message):
        architecture_config(name, **arguments)


# What the models' authors and timm report.
PARAMETERS = {
    "vit_base_patch16_224": 86567656,
    "vit_base_patch14_dinov2": 86579712,
    "vit_giant_patch14_dinov2": 1136479232,
    "vit_gigantic_patch14_clip_224": 1844908544,
    "vit_so400m_patch14_siglip_384": 428225600,
    "vit_7b_patch16_dinov3": 6716030976,
    "vit_huge_plus_patch16_dinov3_qkvb": 840591360,
    "deit_base_distilled_patch16_224": 87338192,
    "eva02_large_patch14_448": 305080232,
    "vit_pe_core_gigantic_patch14_448": 1882033920,
    "vit_so150m2_patch16_reg1_gap_256": 136059560,
    "test_vit3": 930280,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    config = named_config(name)
    zeros = config.depth * config.width * (config.qkv_bias == "qv")  # In place of biases of k.
    assert count_parameters(abstract_parameters(config)) - zeros == PARAMETERS[name]
    assert published_parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("vit_giant_patch14_dinov2", (2, 1536), 1 + 37 * 37),
        ("vit_so400m_patch14_siglip_384", (2, 1152), 27 * 27),
        ("vit_7b_patch16_dinov3", (2, 4096), 5 + 16 * 16),
    ],
)
def test_full_shapes(name, shape, tokens):
    config = named_config(name)
    model = nnx.eval_shape(lambda: hvit_jax.models.ViT(config, Reducer(), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, *config.image_shape, 3), jnp.float32)
    assert jax.eval_shape(lambda s, x: nnx.merge(graph, s)(x), state, images).shape == shape
    assert config.num_tokens == tokens


def test_names_of_models():
    for name in (*MODELS, "vit_base_patch14_dinov2", "vit_7b_patch16_dinov3"):
        config = named_config(name)
        assert model_name(config) == name
        assert model_name(dataclasses.replace(config, resolution=224, num_classes=7)) == name
    assert model_name(architecture_config("deit_small_patch16_224")) == "vit_small_patch16_224"
    assert model_name(architecture_config("vit_small_patch16_384")) == "vit_small_patch16_384"
    dinov3 = architecture_config("vit_base_patch16_dinov3_qkvb")  # transformers' pools CLS.
    assert model_name(dataclasses.replace(dinov3, pool="cls")) == "vit_base_patch16_dinov3_qkvb"
    clip = architecture_config("vit_base_patch16_clip_quickgelu_224")
    clip = dataclasses.replace(clip, position_resizing="bicubic", num_classes=0, projection=512)
    assert model_name(clip) == "vit_base_patch16_clip_quickgelu_224"
    assert model_name(dataclasses.replace(clip, depth=3)) == "custom"


def test_usual_weights():
    usual = weights_of("vit_base_patch14_dinov2")[0]
    assert (usual.tag, usual.licence, usual.classes) == ("lvd142m", "apache-2.0", 0)
    assert usual.found == "timm/vit_base_patch14_dinov2.lvd142m"
    assert other_cards("vit_base_patch14_dinov2") == ("facebook/dinov2-base",)
    assert {weights_of(name)[0].licence for name in MODELS} == {"cc-by-nc-4.0"}
    with pytest.raises(InputError, match="unknown model"):
        weights_of("vit_base")


def test_create_by_name():
    """Traced alone: drawing random weights compiles for seconds."""
    model = nnx.eval_shape(lambda: hvit_jax.create("test_vit2", "tome", r=2, resolution=32))
    assert model.config.image_shape == (32, 32) and model.reducer.name == "tome"
    with pytest.raises(InputError, match="did you mean vit_base_patch14_dinov2"):
        hvit_jax.create("vit_base_patch14_dino2")
