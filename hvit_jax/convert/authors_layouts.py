"""The layouts of models' authors and of timm: which key holds which parameter."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from hvit_jax.convert.keys import (
    BATCH_FIRST,
    NEVER_NEEDED,
    PATCHES,
    PERIODS,
    SEQUENCE_FIRST,
    TEXT_TOWER,
    TOKEN,
    TRANSPOSED,
    Entry,
    Layout,
    Transform,
    apart,
    linear,
    norm,
)


def _swag_table(
    *, positions: tuple[str, Transform], block: str, mlp: tuple[str, str]
) -> tuple[Entry, ...]:
    """List every parameter; the arguments are all that SWAG and torchvision differ in."""
    block = f"encoder.layers.{block}"
    return (
        Entry("class_token", "class_token", "1 1 C", TOKEN),
        Entry("conv_proj.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry("conv_proj.bias", "patch_embed/bias", "C"),
        Entry("encoder.pos_embedding", "pos_embedding", *positions),
        *norm(f"{block}.ln_1.", "blocks/ln_1"),
        *linear(f"{block}.self_attention.in_proj_", "blocks/in_proj", "3C C"),
        *linear(f"{block}.self_attention.out_proj.", "blocks/out_proj", "C C"),
        *norm(f"{block}.ln_2.", "blocks/ln_2"),
        *linear(f"{block}.mlp.{mlp[0]}.", "blocks/linear_1", "H C"),
        *linear(f"{block}.mlp.{mlp[1]}.", "blocks/linear_2", "C M"),
        *norm("encoder.ln.", "ln"),
        *linear("{head}.", "head", "K F"),
    )


_SWITCHES = {
    **{"class_token": True, "position_embedding": True, "position_prefix": 1, "qkv_bias": "all"},
    **{"pool": "cls", "activation": "gelu", "gated": False},
}
SWAG = Layout(
    "SWAG",
    _swag_table(
        positions=("S 1 C", SEQUENCE_FIRST), block="layer_{i}", mlp=("linear_1", "linear_2")
    ),
    {"head": ("head.layers.head", "head", "head.0", "head.1")},
    switches=_SWITCHES,
    usual={"norm_eps": 1e-6},
    resizing=("swag", "swag"),
    family="SWAG",
)
_vision_table = functools.partial(
    _swag_table, positions=("1 S C", BATCH_FIRST), block="encoder_layer_{i}"
)
TORCHVISION = dataclasses.replace(
    SWAG,
    name="torchvision",
    entries=_vision_table(mlp=("0", "3")),
    names={
        "head": ("heads.head", "heads", "heads.0", "heads.1", "heads.head.0", "heads.head.1"),
    },
    family="torchvision",
)
TORCHVISION_OLD = dataclasses.replace(
    TORCHVISION,
    name="torchvision (older)",
    entries=_vision_table(mlp=("linear_1", "linear_2")),
)


# Of OpenAI's text tower, these are called as parts of a tower of pictures on its own are.
_TEXT = ("positional_embedding", r"transformer\..*")


def _meta_block(block: str, *mlp: Entry, attention: tuple[Entry, ...] = ()) -> tuple[Entry, ...]:
    """List the rows of a block as timm and Meta name them; MLPs and biases differ."""
    return (
        *norm(f"{block}.norm1.", "blocks/ln_1"),
        Entry(f"{block}.attn.qkv.weight", "blocks/in_proj/kernel", "3C C", TRANSPOSED),
        Entry(f"{block}.attn.qkv.bias", "blocks/in_proj/bias", "3C", when=("qkv_bias", "all")),
        *attention,
        *linear(f"{block}.attn.proj.", "blocks/out_proj", "C C"),
        Entry(f"{block}.ls1.gamma", "blocks/ls_1", "C"),
        *norm(f"{block}.norm2.", "blocks/ln_2"),
        *mlp,
        Entry(f"{block}.ls2.gamma", "blocks/ls_2", "C"),
    )


def _meta_ends(registers: str) -> tuple[Entry, ...]:
    """List the rows before the first block."""
    patches = "{root}patch_embed.proj"
    return (
        Entry("{root}cls_token", "class_token", "1 1 C", TOKEN),
        Entry(f"{{root}}{registers}", "register_tokens", "1 R C", BATCH_FIRST),
        Entry("{root}pos_embed", "pos_embedding", "1 S C", BATCH_FIRST),
        Entry(f"{patches}.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry(f"{patches}.bias", "patch_embed/bias", "C"),
    )


def _timm_table() -> tuple[Entry, ...]:
    block = "{root}blocks.{i}"
    two = {"variant": "q_bias", "when": ("qkv_bias", "qv")}
    return (
        *_meta_ends("reg_token"),
        Entry("{root}dist_token", "distillation_token", "1 1 C", TOKEN),
        *norm("{root}norm_pre.", "ln_pre"),
        *_meta_block(
            block,
            *linear(f"{block}.mlp.fc1.", "blocks/linear_1", "H C"),
            *apart(
                *(f"{block}.mlp.fc1_g.", f"{block}.mlp.fc1_x."),
                path="blocks/linear_1",
                shape="M C",
                variant="fc1_g",
            ),
            *norm(f"{block}.mlp.norm.", "blocks/mlp_ln", "M"),
            *linear(f"{block}.mlp.fc2.", "blocks/linear_2", "C M"),
            attention=(
                Entry(f"{block}.attn.q_bias", "blocks/in_proj/bias", "C", part=(0, 1, 3), **two),
                Entry(f"{block}.attn.v_bias", "blocks/in_proj/bias", "C", part=(2, 3, 3), **two),
                *apart(
                    *(f"{block}.attn.{part}_proj." for part in "qkv"),
                    shape="C C",
                    variant="q_proj",
                ),
                *norm(f"{block}.attn.q_norm.", "blocks/q_norm", "D"),
                *norm(f"{block}.attn.k_norm.", "blocks/k_norm", "D"),
            ),
        ),
        Entry(f"{block}.gamma_1", "blocks/ls_1", "C", variant="gamma_1"),
        Entry(f"{block}.gamma_2", "blocks/ls_2", "C", variant="gamma_1"),
        *norm("{root}norm.", "ln"),
        *norm("{root}fc_norm.", "pooled_ln"),
        Entry("{root}attn_pool.latent", "pool/probe", "1 1 C", TOKEN),
        *linear("{root}attn_pool.q.", "pool/in_proj", "C C", part=(0, 1, 3)),
        *linear("{root}attn_pool.kv.", "pool/in_proj", "2C C", part=(1, 3, 3)),
        *linear("{root}attn_pool.proj.", "pool/out_proj", "C C"),
        *norm("{root}attn_pool.norm.", "pool/ln"),
        *linear("{root}attn_pool.mlp.fc1.", "pool/linear_1", "N C"),
        *linear("{root}attn_pool.mlp.fc2.", "pool/linear_2", "C N"),
        *linear("{root}head.", "head", "K F"),
        *linear("{root}head_dist.", "distillation_head", "K F"),
    )


# timm's own models, and those of DeiT, DeiT3, DINO, MAE and I-JEPA, which are written like these.
TIMM = Layout("timm", _timm_table(), {"root": ("", "backbone.")}, ignored=NEVER_NEEDED)
OPENCLIP_TIMM = Layout(
    "OpenCLIP timm",
    (*TIMM.entries, Entry("visual.head.proj.weight", "projection/kernel", "V F", TRANSPOSED)),
    {"root": ("visual.trunk.",)},
    ignored=(*NEVER_NEEDED, *TEXT_TOWER),
    beside=_TEXT,
)


def _dinov2_table() -> tuple[Entry, ...]:
    block = "{root}blocks.{i}"
    gated = {"variant": "w12", "when": ("gated", True)}
    return (
        *_meta_ends("register_tokens"),
        *_meta_block(
            block,
            *linear(f"{block}.mlp.fc1.", "blocks/linear_1", "M C", when=("gated", False)),
            *linear(f"{block}.mlp.fc2.", "blocks/linear_2", "C M", when=("gated", False)),
            *linear(f"{block}.mlp.w12.", "blocks/linear_1", "H C", **gated),
            *linear(f"{block}.mlp.w3.", "blocks/linear_2", "C M", **gated),
        ),
        *norm("{root}norm.", "ln"),
        *linear("linear_head.", "head", "K F"),
    )


DINOV2 = Layout(
    "DINOv2",
    _dinov2_table(),
    {"root": ("", "backbone.")},
    switches={
        **{"class_token": True, "position_embedding": True, "position_prefix": 1},
        **{"qkv_bias": "all", "layer_scale": True},
    },
    usual={"norm_eps": 1e-6},
    resizing=("dinov2", "bicubic_antialias"),
    mark=("mask_token", 2),
    ignored=NEVER_NEEDED,
    family="DINOv2",
)


def _dinov3_table() -> tuple[Entry, ...]:
    block = "{root}blocks.{i}"
    masked = {"variant": "bias_mask", "when": ("qkv_bias", "qv")}
    gated = {"variant": "w1", "when": ("gated", True)}
    bias = "blocks/in_proj/bias"
    ends = _meta_ends("storage_tokens")
    return (
        *(row for row in ends if row.path != "pos_embedding"),
        Entry("{root}rope_embed.periods", PERIODS, "T", variant="periods"),
        *_meta_block(
            block,
            *linear(f"{block}.mlp.fc1.", "blocks/linear_1", "M C", when=("gated", False)),
            *linear(f"{block}.mlp.fc2.", "blocks/linear_2", "C M", when=("gated", False)),
            *apart(
                *(f"{block}.mlp.w1.", f"{block}.mlp.w2."),
                path="blocks/linear_1",
                shape="M C",
                **gated,
            ),
            *linear(f"{block}.mlp.w3.", "blocks/linear_2", "C M", **gated),
            attention=(
                Entry(f"{block}.attn.qkv.bias", bias, "3C", **masked),
                Entry(f"{block}.attn.qkv.bias_mask", bias, "3C", mask=True, **masked),
            ),
        ),
        *norm("{root}norm.", "ln"),
        *linear("linear_head.", "head", "K F"),
    )


DINOV3 = Layout(
    "DINOv3",
    _dinov3_table(),
    {"root": ("", "backbone.")},
    switches={
        **{"class_token": True, "position_embedding": False, "layer_scale": True, "norm_eps": 1e-5}
    },
    ignored=NEVER_NEEDED,
    refused={r"(.*\.)?cls_norm\..*": "a norm for CLS and another one for the patches"},
    family="DINOv3",
)


def _openclip_table() -> tuple[Entry, ...]:
    block = "{root}transformer.resblocks.{i}"
    return (
        Entry("{root}class_embedding", "class_token", "C"),
        Entry("{root}positional_embedding", "pos_embedding", "S C"),
        Entry("{root}proj", "projection/kernel", "F V"),
        Entry("{root}conv1.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        *norm("{root}ln_pre.", "ln_pre"),
        *norm(f"{block}.ln_1.", "blocks/ln_1"),
        *linear(f"{block}.attn.in_proj_", "blocks/in_proj", "3C C"),
        *linear(f"{block}.attn.out_proj.", "blocks/out_proj", "C C"),
        Entry(f"{block}.ls_1.gamma", "blocks/ls_1", "C"),
        *norm(f"{block}.ln_2.", "blocks/ln_2"),
        *linear(f"{block}.mlp.c_fc.", "blocks/linear_1", "M C"),
        *linear(f"{block}.mlp.c_proj.", "blocks/linear_2", "C M"),
        Entry(f"{block}.ls_2.gamma", "blocks/ls_2", "C"),
        # Only open_clip_config.json tells a norm of the pooled feature; the last row counts else.
        *norm("{root}ln_post.", "pooled_ln"),
        *norm("{root}ln_post.", "ln"),
    )


CLIP_SWITCHES: dict[str, Any] = {
    **{"class_token": True, "position_embedding": True, "position_prefix": 1},
    **{"pre_norm": True, "patch_bias": False, "qkv_bias": "all", "gated": False},
    "norm_eps": 1e-5,
}
OPENCLIP = Layout(
    "OpenCLIP",
    _openclip_table(),
    {"root": ("visual.", "")},
    anchors=("class_token",),  # conv1.weight is also in every ResNet.
    switches={**CLIP_SWITCHES, "final_norm": True, "pooled_norm": False},
    ignored=(*NEVER_NEEDED, *TEXT_TOWER),
    beside=_TEXT,
    family="CLIP",
)
