"""What a folder of timm, transformers, OpenCLIP or Segmenter says of the model in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hvit_jax.architectures import architecture_config, architectures
from hvit_jax.config import as_pair
from hvit_jax.convert.facts import Facts, distinct, not_plain
from hvit_jax.convert.families import CLIP
from hvit_jax.convert.licences import card_licence
from hvit_jax.convert.transformers_configs import read_transformers
from hvit_jax.convert.variant import VARIANT, read_segmenter, read_yaml
from hvit_jax.errors import InputError, unknown
from hvit_jax.pictures import MEAN, STD, Preprocessing
from hvit_jax.system.files import read_json


def read_facts(folder: Path) -> Facts | None:
    """Read what a folder says of its model.

    Args:
        folder: with `config.json` of timm or transformers, `open_clip_config.json`, or Segmenter's
            `variant.yml`.

    Returns:
        The facts; None if it has none of these files.

    Raises:
        InputError: for a model that is not a plain vision transformer, or a file that is damaged.
    """
    if (file := folder / "config.json").is_file():
        config = read_json(file)
        read = _timm if "architecture" in config else read_transformers
    elif (file := folder / "open_clip_config.json").is_file():
        config, read = read_json(file), _open_clip
    elif (file := folder / VARIANT).is_file():
        config, read = read_yaml(file), read_segmenter
    elif (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter such as LoRA, not a model; merge it into its model first"
        )
    else:
        return None
    try:
        facts = read(config, folder)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{file} is damaged: {type(error).__name__}: {error}") from error
    facts = dataclasses.replace(
        facts, licence=facts.licence or card_licence(folder), file=file.name
    )
    if facts.input_size == facts.switches.get("resolution"):
        facts = dataclasses.replace(facts, input_size=None)
    return facts


# timm


# Sizes that shapes tell; an architecture's own count only where a config repeats them.
_SIZES = {"patch_size": "patch_size", "depth": "depth", "embed_dim": "width"}


def _timm(config: dict[str, Any], folder: Path) -> Facts:
    about = config.get("pretrained_cfg") or config
    given = {**(config.get("model_args") or {})}
    for key in ("global_pool", "num_classes"):
        if key in config:
            given.setdefault(key, config[key])
    if "num_features" in config:
        given.setdefault("embed_dim", config["num_features"])
    facts = _of_architecture(config["architecture"], given)
    size = as_pair(about["input_size"][1:]) if about.get("input_size") else None
    if size is not None:
        facts.switches.setdefault("resolution", size)
    return dataclasses.replace(
        facts,
        preprocessing=_timm_preprocessing(about),
        input_size=size,
        classes=distinct(config.get("label_names") or about.get("label_names") or ()),
        licence=about.get("license"),
    )


def _timm_preprocessing(about: dict[str, Any]) -> Preprocessing | None:
    """Read what timm's `pretrained_cfg` says; what is absent is as timm takes it.

    Returns:
        The preprocessing; None if nothing of it is there.
    """
    if not {"mean", "std", "crop_pct", "crop_mode", "interpolation", "input_size"} & about.keys():
        return None
    return Preprocessing(
        crop_pct=about.get("crop_pct") or 0.875,
        crop_mode=about.get("crop_mode") or "center",
        rounding="timm",
        interpolation=about.get("interpolation") or "bicubic",
        mean=about.get("mean") or MEAN,
        std=about.get("std") or STD,
    )


def _of_architecture(name: str, given: dict[str, Any]) -> Facts:
    """Read what an architecture of timm states, and the arguments given beside it."""
    base = str(name).partition(".")[0]
    if base not in architectures() and (reason := not_plain(base)):
        raise InputError(f"architecture {name!r} is not a plain vision transformer: {reason}")
    size = given.pop("img_size", None)
    # The patches' side is known from the weights alone; any resolution that fits serves here.
    patch = given.get("patch_size", 1)
    model = architecture_config(base, resolution=patch, **{"patch_size": patch, **given})
    switches = dict(vars(model))
    for ours in ("resolution", "mlp_width", "pool_mlp_width"):
        del switches[ours]
    for theirs, ours in _SIZES.items():
        if theirs not in given:
            del switches[ours]
    if "num_classes" not in given:
        del switches["num_classes"]
    if model.final_norm or model.pooled_norm:  # Which, keys tell: the pool may have been changed.
        del switches["final_norm"], switches["pooled_norm"]
    if size is not None:
        switches["resolution"] = as_pair(size)
    return Facts("timm", switches, notes={"architecture": base})


# OpenCLIP


def _open_clip(config: dict[str, Any], folder: Path) -> Facts:
    model = config["model_cfg"]
    vision = model["vision_cfg"]
    facts = (_tower if vision.get("timm_model_name") else _visual)(model, vision)
    about = config.get("preprocess_cfg") or {}
    preprocessing = _open_clip_preprocessing(about)
    size = as_pair(about.get("size") or facts.switches.get("resolution"))
    return dataclasses.replace(facts, preprocessing=preprocessing, input_size=size)


def _open_clip_preprocessing(about: dict[str, Any]) -> Preprocessing:
    """Read what OpenCLIP's `preprocess_cfg` says.

    Raises:
        InputError: for a way of resizing that is not its default or "squash".
    """
    modes = {"shortest": "center", "squash": "squash"}
    mode = about.get("resize_mode") or "shortest"
    if mode not in modes:
        raise unknown("resize_mode", mode, modes)
    return Preprocessing(
        crop_mode=modes[mode],
        interpolation=about.get("interpolation") or "bicubic",
        mean=about.get("mean") or CLIP["mean"],
        std=about.get("std") or CLIP["std"],
    )


def _visual(model: dict[str, Any], vision: dict[str, Any]) -> Facts:
    """Read OpenCLIP's own tower."""
    if isinstance(vision.get("layers"), list):
        raise InputError("its image tower is a ResNet, not a vision transformer")
    if vision.get("attentional_pool"):
        raise InputError("its attentional pooling (CoCa) is not read")
    pools = {"tok": "cls", "avg": "avg"}
    kind = vision.get("pool_type", "tok")
    if kind not in pools:
        raise InputError(f"its pool_type {kind!r} is not read; these are: {', '.join(pools)}")
    after = bool(vision.get("final_ln_after_pool", False))
    names = {"width": "width", "layers": "depth", "patch_size": "patch_size"}
    switches = {
        **{ours: vision[theirs] for theirs, ours in names.items() if theirs in vision},
        "heads": vision.get("width", 768) // vision.get("head_width", 64),
        "resolution": as_pair(vision.get("image_size", 224)),
        "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
        "norm_eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
        "layer_scale": vision.get("ls_init_value") is not None,
        "position_resizing": "bicubic_antialias",
        "patch_bias": False,
        "pre_norm": not vision.get("no_ln_pre", False),
        "pool": pools[kind],
        "final_norm": not after,
        "pooled_norm": after,
        "projection": model["embed_dim"],
    }
    return Facts("OpenCLIP", switches)


def _tower(model: dict[str, Any], vision: dict[str, Any]) -> Facts:
    """Read a tower of timm within OpenCLIP."""
    kind, outputs = vision.get("timm_proj"), model["embed_dim"]
    if kind not in (None, "", "none", "linear") or vision.get("timm_proj_bias"):
        raise InputError(f"its projection timm_proj {kind!r} is not read; none or linear is")
    given = {"num_classes": 0 if kind in ("none", "linear") else outputs}
    if pool := vision.get("timm_pool"):
        given["global_pool"] = pool
    if size := vision.get("image_size"):
        given["img_size"] = size
    facts = _of_architecture(vision["timm_model_name"], given)
    if kind == "linear":
        facts.switches["projection"] = outputs
    return facts
