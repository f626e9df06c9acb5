"""The layouts of PyTorch checkpoints: which key holds which parameter, one table a layout."""

from __future__ import annotations

import dataclasses
import functools

from hvit_jax.convert.keys import (
    BATCH_FIRST,
    PATCHES,
    PERIODS,
    SEQUENCE_FIRST,
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


# Keys that no model of ours needs, whatever the layout: targets of masked training, projections of
# self-supervised training, counters, and tables that follow from sizes.
_NEVER_NEEDED = (
    *(r"(.*\.)?mask_token", r"decoder\..*", r"decoder_.*", r"(dino|ibot)_head\..*"),
    *(r"head\.mlp\..*", r"head\.last_layer\..*", r"projectors\..*", r"pre_logits\..*"),
    *(r"(.*\.)?num_batches_tracked", r"(.*\.)?position_ids"),
    *(r"(.*\.)?rope\w*\.freqs_\w+", r"(.*\.)?relative_position_index", r"local_cls_norm\..*"),
)
# A text tower and what stands between it and the tower of pictures.
_TEXT = (
    *(r"text_model\..*", r"text_projection.*", r"token_embedding\..*", r"text\..*"),
    *("positional_embedding", r"transformer\..*", r"ln_final\..*", "attn_mask"),
    *("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size"),
)


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


def _meta_ends(root: str, registers: str) -> tuple[Entry, ...]:
    """List the rows before the first block."""
    return (
        Entry(f"{root}cls_token", "class_token", "1 1 C", TOKEN),
        Entry(f"{root}{registers}", "register_tokens", "1 R C", BATCH_FIRST),
        Entry(f"{root}pos_embed", "pos_embedding", "1 S C", BATCH_FIRST),
        Entry(f"{root}patch_embed.proj.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry(f"{root}patch_embed.proj.bias", "patch_embed/bias", "C"),
    )


def _timm_table() -> tuple[Entry, ...]:
    block = "{root}blocks.{i}"
    two = {"variant": "q_bias", "when": ("qkv_bias", "qv")}
    return (
        *_meta_ends("{root}", "reg_token"),
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
TIMM = Layout("timm", _timm_table(), {"root": ("", "backbone.")}, ignored=_NEVER_NEEDED)
OPENCLIP_TIMM = Layout(
    "OpenCLIP timm",
    (*TIMM.entries, Entry("visual.head.proj.weight", "projection/kernel", "V F", TRANSPOSED)),
    {"root": ("visual.trunk.",)},
    ignored=_NEVER_NEEDED,
    beside=_TEXT,
)


def _dinov2_table() -> tuple[Entry, ...]:
    block = "{root}blocks.{i}"
    gated = {"variant": "w12", "when": ("gated", True)}
    return (
        *_meta_ends("{root}", "register_tokens"),
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
    resizing=("dinov2", "bicubic_antialias"),
    mark=("mask_token", 2),
    ignored=_NEVER_NEEDED,
    family="DINOv2",
)


def _dinov3_table() -> tuple[Entry, ...]:
    block = "{root}blocks.{i}"
    masked = {"variant": "bias_mask", "when": ("qkv_bias", "qv")}
    gated = {"variant": "w1", "when": ("gated", True)}
    bias = "blocks/in_proj/bias"
    ends = _meta_ends("{root}", "storage_tokens")
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
    ignored=_NEVER_NEEDED,
    refused={r"(.*\.)?cls_norm\..*": "a norm for CLS and another one for the patches"},
    family="DINOv3",
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
    ignored=(*_NEVER_NEEDED, r"(.*\.)?pooler\..*"),
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
    resizing=("bicubic", "bicubic_antialias"),
    ignored=_NEVER_NEEDED,
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
    ignored=_NEVER_NEEDED,
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
    switches={
        **{"class_token": True, "position_embedding": True, "position_prefix": 1},
        **{"pre_norm": True, "patch_bias": False, "qkv_bias": "all", "gated": False},
        "norm_eps": 1e-5,
    },
    classifying={"pool": "avg", "pool_before_norm": True},
    resizing=("bicubic", "bicubic"),
    ignored=_NEVER_NEEDED,
    beside=_TEXT,
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
    resizing=("bicubic", "bicubic"),
    # The pooling that the model for classification does not use.
    ignored=(*_NEVER_NEEDED, r"(vision_model\.)?head\..*"),
    beside=_TEXT,
    family="SigLIP",
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
        *norm("{root}ln_post.", "ln"),
    )


OPENCLIP = Layout(
    "OpenCLIP",
    _openclip_table(),
    {"root": ("visual.", "")},
    anchors=("class_token", "patch_embed/kernel"),
    switches={
        **{"class_token": True, "position_embedding": True, "position_prefix": 1},
        **{"pre_norm": True, "patch_bias": False, "qkv_bias": "all", "gated": False},
        "norm_eps": 1e-5,
    },
    ignored=_NEVER_NEEDED,
    beside=_TEXT,
    family="CLIP",
)

# Of layouts that know equally many keys of a file, the first one is taken.
LAYOUTS = (
    *(SWAG, TORCHVISION, TORCHVISION_OLD, TIMM, DINOV2, DINOV3, OPENCLIP, OPENCLIP_TIMM),
    *(TRANSFORMERS_VIT, TRANSFORMERS_DINOV2, TRANSFORMERS_DINOV3, TRANSFORMERS_CLIP),
    TRANSFORMERS_SIGLIP,
)
# Those that are written, by the names of `--layout`.
WRITTEN = {
    layout.name.lower().replace(" ", "-"): layout for layout in LAYOUTS if layout != TORCHVISION_OLD
}

# Models that are no plain vision transformers, and files that hold no whole model, by their keys.
NOT_READ = {
    r".*\blora_.*|base_model\.model\..*|.*\bada[lk]ora.*|.*\bhada_w.*": (
        "an adapter such as LoRA; merge it into its model (peft: merge_and_unload) and save that"
    ),
    r".*\.(SCB|absmax|quant_map|quant_state\..*|qweight|qzeros|g_idx|weight_packed|weight_scale\w*"
    r"|weight_zero_point|zero_point|_packed_params.*)": (
        "quantised weights; convert the model as it was before"
    ),
    r"(.*\.)?layers\.\d+\.blocks\.\d+\.attn\.(relative_position_bias_table|cpb_mlp.*)": (
        "a Swin Transformer, whose attention stays within windows"
    ),
    r".*\battention\.self\.relative_position_bias_table": "a Swin Transformer or BEiT",
    r"(.*\.)?blocks\.\d+\.attn\.relative_position_bias_table|(.*\.)?rel_pos_bias\..*": (
        "BEiT, whose attention has a bias by relative position"
    ),
    r"(.*\.)?(blocks|layers)\.\d+\.attn\.rel_pos_[hw]": (
        "a ViT with attention in windows and relative positions, as SAM and ViTDet have"
    ),
    r"(.*\.)?(blocks\.\d+\.proj\.weight|pos_embed_(spatial|window))": (
        "Hiera or MViT, whose blocks pool tokens"
    ),
    r"(.*\.)?stages\.\d+\..*|(.*\.)?layer[1-4]\.\d+\.conv\d\..*": (
        "a convolutional or hierarchical network"
    ),
    r"(.*\.)?blocks\.\d+\.(attns|ffns)\.\d+\..*": "a ViT with parallel branches",
}
