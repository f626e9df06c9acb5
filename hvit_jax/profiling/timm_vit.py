"""The rival that people use: the same dense model as timm has it, on the same weights."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from hvit_jax.config import Rope, ViTConfig
from hvit_jax.convert.keys import Form
from hvit_jax.convert.layouts import TIMM
from hvit_jax.errors import InputError, import_optional
from hvit_jax.models.parameters import Tree
from hvit_jax.profiling.torch_vit import as_tensors


def check_timm(config: ViTConfig) -> None:
    """Find out whether timm is installed and has such a model.

    Raises:
        InputError: if not.
    """
    import_optional("timm", "--against timm needs timm: pip install timm")
    if obstacles := list(_obstacles(config)):
        raise InputError(f"--against timm: timm has no model with {', '.join(obstacles)}")


def _obstacles(config: ViTConfig) -> Iterator[str]:
    """List what timm's classes have no argument for."""
    eva = _is_eva(config)
    if config.pool == "cls+avg":
        yield "CLS and the mean of the patches side by side"
    if config.pool_before_norm:
        yield "a norm between pooling and head that is not timm's"
    if config.final_norm and config.pooled_norm:
        yield "a norm before pooling and one after it"
    if config.patch_bias == config.pre_norm:
        yield "this mixture of a norm before the blocks and a bias of the patches"
    if eva and config.activation != ("silu" if config.gated else "gelu"):
        yield f"the activation {config.activation} and rotary positions, or keys without a bias"
    if eva and config.distillation_token:
        yield "a distillation token and rotary positions, or keys without a bias"
    if config.mlp_norm and not eva:
        yield "a norm within the MLP, but no rotary positions, and keys with a bias"
    if not eva and (config.pool_heads or config.pool_mlp_width):
        yield "attention pooling of other sizes than the blocks"


def _is_eva(config: ViTConfig) -> bool:
    """Tell whether timm's Eva is the class, which alone has rotary positions and no key biases."""
    return config.rope is not None or config.qkv_bias == "qv"


def timm_model(config: ViTConfig, parameters: Tree) -> Any:
    """Build timm's model for a configuration that `check_timm` accepts.

    Args:
        config: sizes and switches.
        parameters: the weights.

    Returns:
        The module, in float32 on the CPU, in evaluation mode.
    """
    config, parameters = _as_timm(config, jax.device_get(parameters))
    form = Form.usual(TIMM).fitted(config)
    if _is_eva(config):
        model = _timm("models.eva").Eva(**_common(config), **_of_eva(config))
        more = {"gamma_1"} | ({"fc1_g"} if config.mlp_norm and config.gated else set())
        form = dataclasses.replace(form, variants=form.variants | more)
    else:
        kind = _timm("models.vision_transformer").VisionTransformer
        if config.distillation_token:
            kind = _timm("models.deit").VisionTransformerDistilled
        model = kind(**_common(config), **_of_vit(config))
    model.load_state_dict(as_tensors(parameters, form, config))
    return model.eval()


def _timm(module: str) -> Any:
    """Import a part of timm, which type checkers need not have."""
    return importlib.import_module(f"timm.{module}")


def _as_timm(config: ViTConfig, parameters: Tree) -> tuple[ViTConfig, Tree]:
    """Arrange a model as timm has it, with the same result.

    A projection becomes a head whose bias is 0. Where only some of the tokens before the patches
    have positions, these are added to them.
    """
    parameters = dict(parameters)
    if config.projection:
        kernel = parameters.pop("projection")["kernel"]
        parameters["head"] = {"kernel": kernel, "bias": np.zeros(config.projection, np.float32)}
        config = dataclasses.replace(config, projection=0, num_classes=config.projection)
    some = config.position_prefix * config.position_embedding
    if some and some < config.prefix_tokens:
        table, names = parameters["pos_embedding"], ("class_token", "distillation_token")
        names = [name for name in names if name in parameters][:some]
        for name, entry in zip(names, table, strict=False):
            parameters[name] = parameters[name] + entry
        parameters["pos_embedding"] = table[some:]
        config = dataclasses.replace(config, position_prefix=0)
    return config, parameters


def _common(config: ViTConfig) -> dict[str, Any]:
    """List the arguments that both of timm's classes take."""
    # A ratio of which timm's rounding down makes these channels; it packs a gated MLP's halves.
    packed = config.gated and not _is_eva(config)
    return {
        "img_size": config.image_shape,
        "patch_size": config.patch_size,
        "num_classes": config.num_classes,
        "global_pool": {"cls": "token", "two heads": "token"}.get(config.pool, config.pool),
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": (config.mlp_width * (1 + packed) + 0.5) / config.width,
        "qkv_bias": config.qkv_bias != "none",
        "qk_norm": config.qk_norm,
        "init_values": 1.0 if config.layer_scale else None,
        "class_token": config.class_token,
        "no_embed_class": config.position_prefix == 0,
        "norm_layer": functools.partial(_timm("layers").LayerNorm, eps=config.norm_eps),
    }


def _of_vit(config: ViTConfig) -> dict[str, Any]:
    gated = {}
    if config.gated:
        gated["mlp_layer"] = functools.partial(_timm("layers").GluMlp, gate_last=False)
    return {
        "reg_tokens": config.registers,
        "pos_embed": "learn" if config.position_embedding else "none",
        "pre_norm": config.pre_norm,
        "final_norm": config.final_norm or config.pooled_norm,
        "fc_norm": config.pooled_norm,
        "pool_include_prefix": config.pool_prefix,
        "act_layer": config.activation,
        **gated,
    }


def _of_eva(config: ViTConfig) -> dict[str, Any]:
    return {
        "num_reg_tokens": config.registers,
        "use_abs_pos_emb": config.position_embedding,
        "use_pre_transformer_norm": config.pre_norm,
        "use_post_transformer_norm": config.final_norm,
        "use_fc_norm": config.pooled_norm,
        # EVA's own attention has no bias on keys; the other one has.
        "attn_type": "rope" if config.qkv_bias == "all" else "eva",
        "swiglu_mlp": config.gated,
        "scale_mlp": config.mlp_norm,
        "attn_pool_num_heads": config.pool_heads or None,
        "attn_pool_mlp_ratio": ((config.pool_mlp_width or config.mlp_width) + 0.5) / config.width,
        **(_rotary(config.rope) if config.rope else {}),
    }


def _rotary(rope: Rope) -> dict[str, Any]:
    count = len(rope.periods)
    # Periods are its powers; those of some files are rounded to 16 bits.
    temperature = round(rope.periods[-1] ** (count / max(1, count - 1)))
    return {
        "use_rot_pos_emb": True,
        "rope_type": "dinov3" if rope.coordinates == "centred" else "cat",
        "rope_temperature": float(temperature),
        "rope_rotate_half": not rope.interleaved,
        "rope_grid_offset": rope.offset if rope.coordinates == "grid" else 0.0,
        "rope_grid_indexing": "xy" if rope.first_axis == "x" else "ij",
        "ref_feat_shape": rope.reference if rope.coordinates == "grid" else None,
    }
