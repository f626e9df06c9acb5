"""The layouts of transformers: which key holds which parameter."""

from __future__ import annotations

from hvit_jax.convert.authors_layouts import CLIP_SWITCHES
from hvit_jax.convert.keys import (
    BATCH_FIRST,
    NEVER_NEEDED,
    PATCHES,
    TEXT_TOWER,
    TOKEN,
    TRANSPOSED,
    Entry,
    Layout,
    apart,
    linear,
    norm,
)


def _encoder_ends() -> tuple[Entry, ...]:
    """List the rows before the first block of transformers' ViT and DINOv2."""
    patches = "{root}embeddings.patch_embeddings.projection"
    return (
        Entry("{root}embeddings.cls_token", "class_token", "1 1 C", TOKEN),
        Entry("{root}embeddings.position_embeddings", "pos_embedding", "1 S C", BATCH_FIRST),
        Entry(f"{patches}.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry(f"{patches}.bias", "patch_embed/bias", "C"),
    )


def _encoder_attention(block: str) -> tuple[Entry, ...]:
    separate = [f"{block}.attention.attention.{part}." for part in ("query", "key", "value")]
    return (
        *apart(*separate, shape="C C"),
        *linear(f"{block}.attention.output.dense.", "blocks/out_proj", "C C"),
    )


def _vit_table() -> tuple[Entry, ...]:
    block = "{root}encoder.layer.{i}"
    teacher = {"variant": "cls_classifier", "when": ("pool", "two heads")}
    return (
        *_encoder_ends(),
        Entry("{root}embeddings.distillation_token", "distillation_token", "1 1 C", TOKEN),
        *norm(f"{block}.layernorm_before.", "blocks/ln_1"),
        *_encoder_attention(block),
        *norm(f"{block}.layernorm_after.", "blocks/ln_2"),
        *linear(f"{block}.intermediate.dense.", "blocks/linear_1", "M C"),
        *linear(f"{block}.output.dense.", "blocks/linear_2", "C M"),
        *norm("{root}layernorm.", "ln"),
        *norm("{root}fc_norm.", "pooled_ln"),
        *linear("cls_classifier.", "head", "K F", **teacher),
        *linear("distillation_classifier.", "distillation_head", "K F", **teacher),
        *linear("classifier.", "head", "K F"),
    )


TRANSFORMERS_VIT = Layout(
    "transformers vit",
    _vit_table(),
    {"root": ("vit.", "deit.", "")},
    switches={
        **{"class_token": True, "position_embedding": True, "gated": False, "norm_eps": 1e-12}
    },
    resizing=("bicubic", "bicubic"),
    ignored=(*NEVER_NEEDED, r"(.*\.)?pooler\..*"),
)


def _transformers_dinov2_table() -> tuple[Entry, ...]:
    block = "{root}encoder.layer.{i}"
    gated = {"variant": "weights_in", "when": ("gated", True)}
    return (
        *_encoder_ends(),
        Entry("{root}embeddings.register_tokens", "register_tokens", "1 R C", BATCH_FIRST),
        *norm(f"{block}.norm1.", "blocks/ln_1"),
        *_encoder_attention(block),
        Entry(f"{block}.layer_scale1.lambda1", "blocks/ls_1", "C"),
        *norm(f"{block}.norm2.", "blocks/ln_2"),
        *linear(f"{block}.mlp.fc1.", "blocks/linear_1", "M C", when=("gated", False)),
        *linear(f"{block}.mlp.fc2.", "blocks/linear_2", "C M", when=("gated", False)),
        *linear(f"{block}.mlp.weights_in.", "blocks/linear_1", "H C", **gated),
        *linear(f"{block}.mlp.weights_out.", "blocks/linear_2", "C M", **gated),
        Entry(f"{block}.layer_scale2.lambda1", "blocks/ls_2", "C"),
        *norm("{root}layernorm.", "ln"),
        *linear("classifier.", "head", "K F"),
    )


TRANSFORMERS_DINOV2 = Layout(
    "transformers dinov2",
    _transformers_dinov2_table(),
    {"root": ("dinov2.", "dinov2_with_registers.", "")},
    switches={
        **{"class_token": True, "position_embedding": True, "position_prefix": 1},
        "layer_scale": True,
    },
    usual={"norm_eps": 1e-6},
    resizing=("bicubic", "bicubic_antialias"),
    ignored=NEVER_NEEDED,
    family="DINOv2",
)


def _transformers_dinov3_table() -> tuple[Entry, ...]:
    block = "{root}{layers}.{i}"
    gated = {"variant": "gate_proj", "when": ("gated", True)}
    return (
        Entry("{root}embeddings.cls_token", "class_token", "1 1 C", TOKEN),
        Entry("{root}embeddings.register_tokens", "register_tokens", "1 R C", BATCH_FIRST),
        Entry("{root}embeddings.patch_embeddings.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry("{root}embeddings.patch_embeddings.bias", "patch_embed/bias", "C"),
        *norm(f"{block}.norm1.", "blocks/ln_1"),
        *apart(*(f"{block}.attention.{part}_proj." for part in "qkv"), shape="C C"),
        *linear(f"{block}.attention.o_proj.", "blocks/out_proj", "C C"),
        Entry(f"{block}.layer_scale1.lambda1", "blocks/ls_1", "C"),
        *norm(f"{block}.norm2.", "blocks/ln_2"),
        *linear(f"{block}.mlp.up_proj.", "blocks/linear_1", "M C", when=("gated", False)),
        *apart(
            *(f"{block}.mlp.gate_proj.", f"{block}.mlp.up_proj."),
            path="blocks/linear_1",
            shape="M C",
            **gated,
        ),
        *linear(f"{block}.mlp.down_proj.", "blocks/linear_2", "C M"),
        Entry(f"{block}.layer_scale2.lambda1", "blocks/ls_2", "C"),
        *norm("{root}norm.", "ln"),
        *linear("classifier.", "head", "K F"),
    )


TRANSFORMERS_DINOV3 = Layout(
    "transformers dinov3_vit",
    _transformers_dinov3_table(),
    {"root": ("", "dinov3_vit."), "layers": ("layer", "model.layer")},
    anchors=("class_token", "patch_embed/kernel"),
    switches={
        **{"class_token": True, "position_embedding": False, "layer_scale": True, "norm_eps": 1e-5}
    },
    ignored=NEVER_NEEDED,
    family="DINOv3",
)


def _transformers_clip_table(*rows: Entry) -> tuple[Entry, ...]:
    """List the rows that CLIP and SigLIP share, and others before the last."""
    block, embeddings = "{root}encoder.layers.{i}", "{root}embeddings"
    separate = [f"{block}.self_attn.{part}_proj." for part in "qkv"]
    patches = f"{embeddings}.patch_embedding.weight"
    return (
        Entry(patches, "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry(f"{embeddings}.position_embedding.weight", "pos_embedding", "S C"),
        *norm(f"{block}.layer_norm1.", "blocks/ln_1"),
        *apart(*separate, shape="C C"),
        *linear(f"{block}.self_attn.out_proj.", "blocks/out_proj", "C C"),
        *norm(f"{block}.layer_norm2.", "blocks/ln_2"),
        *linear(f"{block}.mlp.fc1.", "blocks/linear_1", "M C"),
        *linear(f"{block}.mlp.fc2.", "blocks/linear_2", "C M"),
        *norm("{root}post_layernorm.", "ln"),
        *rows,
        *linear("classifier.", "head", "K F"),
    )


TRANSFORMERS_CLIP = Layout(
    "transformers clip",
    _transformers_clip_table(
        Entry("{root}embeddings.class_embedding", "class_token", "C"),
        *norm("{root}pre_layrnorm.", "ln_pre"),
        Entry("visual_projection.weight", "projection/kernel", "V F", TRANSPOSED),
    ),
    {"root": ("vision_model.", "")},
    anchors=("class_token", "patch_embed/kernel"),
    switches=CLIP_SWITCHES,
    classifying={"pool": "avg", "pool_before_norm": True},
    resizing=("bicubic", "bicubic"),
    ignored=(*NEVER_NEEDED, *TEXT_TOWER),
    family="CLIP",
)
TRANSFORMERS_SIGLIP = Layout(
    "transformers siglip",
    _transformers_clip_table(
        # SigLIP 2 for pictures of any size stores the convolution as a linear layer.
        Entry(
            "{root}embeddings.patch_embedding.weight",
            "patch_embed/kernel",
            "C 3pp",
            TRANSPOSED,
            variant="linear",
        ),
        Entry("{root}embeddings.patch_embedding.bias", "patch_embed/bias", "C"),
        Entry("{root}head.probe", "pool/probe", "1 1 C", TOKEN),
        *linear("{root}head.attention.in_proj_", "pool/in_proj", "3C C"),
        *linear("{root}head.attention.out_proj.", "pool/out_proj", "C C"),
        *norm("{root}head.layernorm.", "pool/ln"),
        *linear("{root}head.mlp.fc1.", "pool/linear_1", "N C"),
        *linear("{root}head.mlp.fc2.", "pool/linear_2", "C N"),
    ),
    {"root": ("vision_model.", "")},
    anchors=("patch_embed/kernel",),
    switches={
        **{"class_token": False, "position_embedding": True, "position_prefix": 0},
        **{"qkv_bias": "all", "gated": False},
    },
    classifying={"pool": "avg"},
    usual={"norm_eps": 1e-6},
    resizing=("bicubic", "bicubic"),
    # The pooling that the model for classification does not use.
    ignored=(*NEVER_NEEDED, *TEXT_TOWER, r"(vision_model\.)?head\..*"),
    family="SigLIP",
)
