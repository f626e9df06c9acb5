"""All layouts of PyTorch checkpoints that are known, and what is known not to be read."""

from __future__ import annotations

from hvit_jax.convert.authors_layouts import (
    DINOV2,
    DINOV3,
    OPENCLIP,
    OPENCLIP_TIMM,
    SWAG,
    TIMM,
    TORCHVISION,
    TORCHVISION_OLD,
)
from hvit_jax.convert.dense_layouts import SEGMENTER, SEGMENTER_MMSEG, with_heads
from hvit_jax.convert.transformers_layouts import (
    TRANSFORMERS_CLIP,
    TRANSFORMERS_DINOV2,
    TRANSFORMERS_DINOV3,
    TRANSFORMERS_SIGLIP,
    TRANSFORMERS_VIT,
)

_BACKBONES = (
    *(SWAG, TORCHVISION, TORCHVISION_OLD, TIMM, DINOV2, DINOV3, OPENCLIP, OPENCLIP_TIMM),
    *(TRANSFORMERS_VIT, TRANSFORMERS_DINOV2, TRANSFORMERS_DINOV3, TRANSFORMERS_CLIP),
    TRANSFORMERS_SIGLIP,
)
# Of layouts that know equally many keys of a file, the first one is taken.
LAYOUTS = (*map(with_heads, _BACKBONES), SEGMENTER, SEGMENTER_MMSEG)
# Those that are written, by the names of `--layout`.
WRITTEN = {
    layout.name.lower().replace(" ", "-"): layout
    for layout in LAYOUTS
    if layout.name != TORCHVISION_OLD.name
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
