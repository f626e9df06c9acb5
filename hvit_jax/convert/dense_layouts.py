"""The layouts of models that make maps: Segmenter's, and heads beside any backbone."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvit_jax.convert.authors_layouts import TIMM
from hvit_jax.convert.keys import (
    BATCH_FIRST,
    OF_PLACES,
    OF_SQUARES,
    PATCHES,
    TO_SQUARES,
    TOKEN,
    TRANSPOSED,
    Entry,
    Layout,
    Transform,
    linear,
    norm,
)

HEAD = "decode_head."  # What the keys of a head start with that stands beside a backbone.


def _segmenter_decoder(root: str) -> tuple[Entry, ...]:
    """List the rows of Segmenter's two decoders."""
    block, ours = f"{root}blocks.{{i}}", "decoder/blocks"
    return (
        Entry(f"{root}cls_emb", "decoder/class_tokens", "1 O C", BATCH_FIRST),
        Entry(f"{root}proj_patch", "decoder/patch_projection", "C C"),
        Entry(f"{root}proj_classes", "decoder/class_projection", "C C"),
        *norm(f"{block}.norm1.", f"{ours}/ln_1"),
        *linear(f"{block}.attn.qkv.", f"{ours}/in_proj", "3C C"),
        *linear(f"{block}.attn.proj.", f"{ours}/out_proj", "C C"),
        *norm(f"{block}.norm2.", f"{ours}/ln_2"),
        *linear(f"{block}.mlp.fc1.", f"{ours}/linear_1", "4C C"),
        *linear(f"{block}.mlp.fc2.", f"{ours}/linear_2", "C 4C"),
        *linear(f"{root}proj_dec.", "decoder/proj", "C C"),
        *norm(f"{root}decoder_norm.", "decoder/norm"),
        *norm(f"{root}mask_norm.", "decoder/mask_norm", "O"),
        *linear(f"{root}head.", "decoder/linear", "O C", when=("decoder.kind", "linear")),
    )


def _convolution(
    key: str, path: str, shape: str, transform: Transform = OF_SQUARES, **more: Any
) -> tuple[Entry, Entry]:
    """List the rows of a convolution with a bias; `shape` is its weight's."""
    outputs = shape.split()[0 if transform is not TO_SQUARES else 1]
    return (
        Entry(f"{key}.weight", f"{path}/kernel", shape, transform, **more),
        Entry(f"{key}.bias", f"{path}/bias", outputs, **more),
    )


def _scores(key: str, shape: str, kind: str) -> tuple[Entry, ...]:
    """List the rows of the one layer of a linear head of DINOv2's."""
    more = {"variant": key, "when": ("decoder.kind", kind)}
    return _convolution(f"{HEAD}{key}", "decoder/linear", shape, OF_PLACES, **more)


def _dinov2_linear() -> tuple[Entry, ...]:
    """List the rows of DINOv2's linear heads, for segments and for depth."""
    return (
        Entry(f"{HEAD}bn.weight", "decoder/scale", "J"),
        Entry(f"{HEAD}bn.bias", "decoder/bias", "J"),
        Entry(f"{HEAD}bn.running_mean", "decoder/mean", "J"),
        Entry(f"{HEAD}bn.running_var", "decoder/variance", "J"),
        *_scores("conv_seg", "O J 1 1", "bn_linear"),
        *_scores("conv_depth", "O 2J 1 1", "depth_linear"),
    )


def _dinov2_dpt() -> tuple[Entry, ...]:
    """List the rows of DPT's depth as DINOv2 has it; a, b, c, d are the taps' channels."""
    made, rows = f"{HEAD}reassemble_blocks.", ()
    for tap, size in enumerate("abcd"):
        readout, project = f"{made}readout_projects.{tap}.0.", f"{made}projects.{tap}.conv"
        rows += linear(readout, f"decoder/readout/{tap}", "W 2W")
        rows += _convolution(project, f"decoder/project/{tap}", f"{size} W 1 1", OF_PLACES)
        kernel = f"decoder/convs/{tap}/kernel"
        rows += (Entry(f"{HEAD}convs.{tap}.conv.weight", kernel, f"U {size} 3 3", OF_SQUARES),)
    rows += _convolution(f"{made}resize_layers.0", "decoder/enlarge_0", "a a 4 4", TO_SQUARES)
    rows += _convolution(f"{made}resize_layers.1", "decoder/enlarge_1", "b b 2 2", TO_SQUARES)
    rows += _convolution(f"{made}resize_layers.3", "decoder/shrink_3", "d d 3 3")
    for step in range(4):
        theirs, ours = f"{HEAD}fusion_blocks.{step}", f"decoder/fusion/{step}"
        rows += _convolution(f"{theirs}.project.conv", f"{ours}/project", "U U 1 1")
        for unit, name in (("res_conv_unit1", "of_tap"), ("res_conv_unit2", "of_sum")):
            for layer in (1, 2):
                key = f"{theirs}.{unit}.conv{layer}.conv.weight"
                rows += (Entry(key, f"{ours}/{name}/conv_{layer}/kernel", "U U 3 3", OF_SQUARES),)
    return (
        *rows,
        *_convolution(f"{HEAD}project.conv", "decoder/smooth", "U U 3 3"),
        *_convolution(f"{HEAD}conv_depth.head.0", "decoder/head_0", "h U 3 3"),
        *_convolution(f"{HEAD}conv_depth.head.2", "decoder/head_1", "32 h 3 3"),
        *_convolution(f"{HEAD}conv_depth.head.4", "decoder/head_2", "1 32 1 1"),
    )


# Paths of which every head has one: its keys tell where in a file a head is.
OF_HEADS = ("decoder/class_tokens", "decoder/linear/kernel", "decoder/head_0/kernel")
HEADS = (*_segmenter_decoder(HEAD), *_dinov2_linear(), *_dinov2_dpt())


def with_heads(layout: Layout) -> Layout:
    """Let a backbone's layout have the rows of heads beside it."""
    return dataclasses.replace(layout, entries=(*layout.entries, *HEADS))


_SWITCHES = {
    **{"class_token": True, "position_embedding": True, "qkv_bias": "all", "gated": False},
    **{"activation": "gelu", "final_norm": True, "pool": "cls"},
}
_CLASSIFIES = ("head", "distillation_head")
# Strudel et al. 2021; https://github.com/rstrudel/segmenter.
SEGMENTER = Layout(
    "Segmenter",
    (
        *(row for row in TIMM.entries if row.path.split("/")[0] not in _CLASSIFIES),
        *_segmenter_decoder("decoder."),
    ),
    {"root": ("encoder.",)},
    anchors=OF_HEADS,
    switches=_SWITCHES,
    usual={"norm_eps": 1e-5},
    resizing=("bilinear", "bilinear"),
    ignored=(r"head(_dist)?\..*",),
    family="Segmenter",
)


def _mmseg_table() -> tuple[Entry, ...]:
    block, patches = "{root}layers.{i}", "{root}patch_embed.projection"
    return (
        Entry("{root}cls_token", "class_token", "1 1 C", TOKEN),
        Entry("{root}pos_embed", "pos_embedding", "1 S C", BATCH_FIRST),
        Entry(f"{patches}.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry(f"{patches}.bias", "patch_embed/bias", "C"),
        *norm(f"{block}.ln1.", "blocks/ln_1"),
        Entry(f"{block}.attn.attn.in_proj_weight", "blocks/in_proj/kernel", "3C C", TRANSPOSED),
        Entry(f"{block}.attn.attn.in_proj_bias", "blocks/in_proj/bias", "3C"),
        *linear(f"{block}.attn.attn.out_proj.", "blocks/out_proj", "C C"),
        *norm(f"{block}.ln2.", "blocks/ln_2"),
        *linear(f"{block}.ffn.layers.0.0.", "blocks/linear_1", "M C"),
        *linear(f"{block}.ffn.layers.1.", "blocks/linear_2", "C M"),
        *norm("{root}ln1.", "ln"),
        *_segmenter_decoder(HEAD),
    )


# Segmenter's weights for mmseg, as Liang et al. 2022 (arXiv 2210.01035) measured Hourglass.
SEGMENTER_MMSEG = Layout(
    "Segmenter mmseg",
    _mmseg_table(),
    {"root": ("backbone.",)},
    switches=_SWITCHES,
    usual={"norm_eps": 1e-6},
    resizing=("bicubic", "bicubic"),
    ignored=(r"encoder\.head(_dist)?\..*", r"auxiliary_head\..*", r"(.*\.)?num_batches_tracked"),
    family="Segmenter",
)
