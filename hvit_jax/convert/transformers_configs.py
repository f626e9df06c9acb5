"""What a folder of transformers says of the model in it: `config.json` and its preprocessor's."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvit_jax.architectures import ACTIVATIONS
from hvit_jax.config import Rope, as_pair
from hvit_jax.convert.facts import Facts, distinct, not_plain
from hvit_jax.convert.families import CLIP, HALF, IMAGENET
from hvit_jax.errors import InputError
from hvit_jax.pictures import Preprocessing, crop_share
from hvit_jax.system.files import read_json

Size = tuple[int, int]
# Fields that a config.json may leave out, as its class takes them.
_PLAIN = {"num_attention_heads": 12, "hidden_act": "gelu", "image_size": 224}
_CLIP = {**_PLAIN, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {**_PLAIN, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_DINOV2 = {**_PLAIN, "layer_norm_eps": 1e-6, "qkv_bias": True, "use_swiglu_ffn": False}
_VIT = {**_PLAIN, "layer_norm_eps": 1e-12, "qkv_bias": True}
_DINOV3 = {
    **{**_PLAIN, "num_attention_heads": 6, "layer_norm_eps": 1e-5, "use_gated_mlp": False},
    **{"query_bias": True, "key_bias": False, "value_bias": True, "rope_theta": 100.0},
}
# What comes of the tokens, by the end of the name of the class that was saved.
_HEADS = ("ForImageClassification", "ForImageClassificationWithTeacher")
_BODIES = (
    *("Model", "ModelWithProjection", "Backbone", "VisionTransformer"),
    *("ForPreTraining", "ForMaskedImageModeling"),
)


def read_transformers(config: dict[str, Any], folder: Path) -> Facts:
    """Read what `config.json` says, and what stands beside it; see `configs.read_facts`."""
    if config.get("quantization_config"):
        raise InputError("its weights are quantised; take the model's own in float32 or float16")
    kind = config.get("model_type")
    if kind is None:
        raise InputError("it names neither an architecture of timm nor a model_type")
    kind = str(kind).removesuffix("_vision_model")
    if kind not in _TYPES:
        known = ", ".join(_TYPES)
        reason = not_plain(kind)
        words = f"a plain vision transformer: {reason}" if reason else f"read; these are: {known}"
        raise InputError(f"model_type {config['model_type']!r} is not {words}")
    defaults, processor, read_switches = _TYPES[kind]
    stated = config["vision_config"] if "vision_config" in config else config
    about = {**defaults, **{key: each for key, each in stated.items() if each is not None}}
    if about.get("num_channels", 3) != 3:
        raise InputError(f"its pictures have {about['num_channels']} channels, not 3")
    switches = {
        **_stated_sizes(about),
        "heads": operator.index(about["num_attention_heads"]),
        "norm_eps": about["layer_norm_eps"],
        "activation": _activation(about["hidden_act"]),
        "position_resizing": "bicubic",
        **read_switches(about),
    }
    saved = (config.get("architectures") or ["Model"])[0]
    switches |= _pool(kind, saved, about)
    pictures = _preprocessing(folder, processor, switches.get("resolution"))
    names = _labels(config)
    if names and saved.endswith(_HEADS):
        switches["num_classes"] = len(names)
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        names = []
    notes = {}
    if kind == "siglip2":
        notes["pictures"] = "of any shape are resized to a square, not to as many patches"
    preprocessing, size = pictures or (None, None)
    return Facts(
        f"transformers {kind}", switches, preprocessing, size, distinct(names), notes=notes
    )


def _labels(config: dict[str, Any]) -> list[str]:
    labels = config.get("id2label") or {}
    return [str(labels[key]) for key in sorted(labels, key=int)]


def _stated_sizes(about: dict[str, Any]) -> dict[str, Any]:
    """Read sizes where a config writes them down, and the model's resolution."""
    names = {
        **{"hidden_size": "width", "num_hidden_layers": "depth", "patch_size": "patch_size"},
        **{"intermediate_size": "mlp_width", "num_register_tokens": "registers"},
    }
    if "mlp_ratio" in about:  # DINOv2, whose class knows no intermediate_size.
        del names["intermediate_size"]
    sizes = {ours: about[theirs] for theirs, ours in names.items() if theirs in about}
    if isinstance(patch := sizes.get("patch_size"), list):
        if len(set(patch)) != 1:
            raise InputError(f"its patches are not square: {patch}")
        sizes["patch_size"] = patch[0]
    size = about["image_size"]
    if size is not None:
        sizes["resolution"] = as_pair(size)
    return sizes


def _activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"the activation {name!r} is not read; these are: {known}")
    return ACTIVATIONS[name]


def _vit(about: dict[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": "all" if about["qkv_bias"] else "none"}


def _deit(about: dict[str, Any]) -> dict[str, Any]:
    return {**_vit(about), "distillation_token": True, "position_prefix": 2}


def _dinov2(about: dict[str, Any]) -> dict[str, Any]:
    gated = {"gated": True, "activation": "silu"} if about["use_swiglu_ffn"] else {}
    return {**_vit(about), "layer_scale": True, **gated}


def _dinov2_with_registers(about: dict[str, Any]) -> dict[str, Any]:
    return {**_dinov2(about), "position_resizing": "bicubic_antialias"}


def _dinov3(about: dict[str, Any]) -> dict[str, Any]:
    """Read the switches; rotary positions only where the width is stated too."""
    biases = tuple(bool(about[f"{name}_bias"]) for name in ("query", "key", "value"))
    kind = {(True,) * 3: "all", (True, False, True): "qv", (False,) * 3: "none"}.get(biases)
    if kind is None:
        raise InputError("of the projections to q, k and v, q and v must both have a bias or none")
    theta = (about.get("rope_parameters") or {}).get("rope_theta", about["rope_theta"])
    head = about.get("hidden_size", 384) // about["num_attention_heads"]
    return {
        "qkv_bias": kind,
        "layer_scale": True,
        "gated": about["use_gated_mlp"],
        "position_embedding": False,
        "position_prefix": 0,
        "rope": Rope.spaced(head, theta),
    }


def _clip(about: dict[str, Any]) -> dict[str, Any]:
    return {"patch_bias": False, "pre_norm": True}


def _siglip(about: dict[str, Any]) -> dict[str, Any]:
    return {"class_token": False, "position_prefix": 0}


def _siglip2(about: dict[str, Any]) -> dict[str, Any]:
    """Read the switches of NaFlex, whose table is a square of `num_patches`."""
    side = math.isqrt(about["num_patches"])
    patch = about.get("patch_size", 16)
    return {
        **_siglip(about),
        "resolution": (side * patch, side * patch),
        "position_resizing": "bilinear_antialias",
    }


# By model_type: the fields that a config.json may leave out, the class of the usual processor, and
# what reads the switches.
_TYPES: dict[str, tuple[dict[str, Any], str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "vit": (_VIT, "ViT", _vit),
    "deit": (_VIT, "DeiT", _deit),
    "vit_mae": (_VIT, "ViT", _vit),
    "dinov2": (_DINOV2, "Bit", _dinov2),
    "dinov2_with_registers": (_DINOV2, "Bit", _dinov2_with_registers),
    "dinov3_vit": (_DINOV3, "DINOv3ViT", _dinov3),
    "clip": (_CLIP, "CLIP", _clip),
    "siglip": (_SIGLIP, "Siglip", _siglip),
    "siglip2": ({**_SIGLIP, "num_patches": 256, "image_size": None}, "Siglip2", _siglip2),
}


def _pool(kind: str, saved: str, about: dict[str, Any]) -> dict[str, Any]:
    """Tell by the name of the class that was saved what becomes of the tokens."""
    head = next((end for end in _HEADS if saved.endswith(end)), None)
    if head is None and not saved.endswith(_BODIES):
        raise InputError(f"the class {saved} is not read; a model alone or an image classifier is")
    if kind.startswith("siglip"):
        return {"pool": "map" if head is None and about.get("vision_use_head", True) else "avg"}
    if head is None:
        return {"pool": "cls"}
    if kind == "dinov3_vit":
        raise InputError(f"the class {saved} is not read; DINOv3ViTModel is")
    if kind == "clip":
        return {"pool": "avg", "pool_before_norm": True}
    if kind.startswith("dinov2"):
        return {"pool": "cls+avg"}
    return {"pool": "two heads" if head == _HEADS[1] else "cls"}


# Where transformers' classes take what a preprocessor_config.json does not say.
_SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
_SHORTEST = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
_BILINEAR, _BICUBIC = {"resample": 2}, {"resample": 3}
_PROCESSORS = {
    "ViT": {**_SQUARE, **_BILINEAR, **HALF},
    "DeiT": {**_SQUARE, **_BICUBIC, **HALF, "size": 256, "do_center_crop": True, "crop_size": 224},
    "Bit": {**_SHORTEST, **_BICUBIC, **CLIP},
    "DINOv3ViT": {**_SQUARE, **_BILINEAR, **IMAGENET},
    "CLIP": {**_SHORTEST, **_BICUBIC, **CLIP},
    "Siglip": {**_SQUARE, **_BICUBIC, **HALF},
    "Siglip2": {**_SQUARE, **_BILINEAR, **HALF, "size": None},
}
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_CLASS = re.compile(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


def _preprocessing(
    folder: Path, usual: str, native: Size | None
) -> tuple[Preprocessing, Size | None] | None:
    """Read a folder's `preprocessor_config.json`; what is absent is as its class takes it.

    Args:
        folder: of the model.
        usual: the class that models of this type use, such as "ViT".
        native: height and width of the model's pictures, where the processor does not say.

    Returns:
        The preprocessing, with the margins of transformers, and the height and width that it ends
        in; None if the folder does not say.

    Raises:
        InputError: for a step that cannot be followed.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        stated = read_json(file)
    elif (file := folder / "processor_config.json").is_file():
        stated = read_json(file).get("image_processor") or {}
    else:
        return None
    if not stated:
        return None
    kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or ""
    match = _CLASS.fullmatch(kind)
    name = match[1] if match and match[1] in _PROCESSORS else usual
    about = {**_PROCESSORS[name], **{key: each for key, each in stated.items() if each is not None}}
    try:
        return _processor(about, name, native)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _processor(
    about: dict[str, Any], name: str, native: Size | None
) -> tuple[Preprocessing, Size | None]:
    if not about.get("do_resize", True):
        raise InputError("do_resize is false: pictures of all sizes cannot be put into one batch")
    if about["resample"] not in _FILTERS:
        raise InputError(f"resample {about['resample']!r} is not one of {_FILTERS}")
    size, shortest = _size(about["size"], name)
    crop, _ = _size(about.get("crop_size"), "")
    crop = crop if about["do_center_crop"] and crop else size
    share = 1.0
    if crop and size:
        if crop[0] > size[0] or crop[1] > size[1]:
            raise InputError(f"crop_size {crop} is larger than size {size}")
        share = crop_share(min(crop), min(size))
    mean, std = _statistics(about)
    return Preprocessing(
        crop_pct=share,
        crop_mode="center" if shortest else "squash",
        rounding="transformers",
        interpolation=_FILTERS[about["resample"]],
        mean=mean,
        std=std,
    ), crop or native


def _size(size: Any, name: str) -> tuple[Size | None, bool]:
    """Read a size: height and width, and whether a picture's short side comes to it."""
    if size is None:  # SigLIP 2 NaFlex: as many patches as fit.
        return None, False
    if not isinstance(size, dict):
        return as_pair(size), name in ("CLIP", "Bit")
    if "height" in size and "width" in size:
        return as_pair((size["height"], size["width"])), False
    if "shortest_edge" in size:
        return as_pair(size["shortest_edge"]), True
    raise InputError(f"size {size} names neither height and width nor shortest_edge")


def _statistics(about: dict[str, Any]) -> tuple[Any, Any]:
    """Read mean and deviation, on a scale from 0 to 1 whatever the pixels are multiplied by."""
    mean, std = (about.get(f"image_{name}") or about[name] for name in ("mean", "std"))
    if not about.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = about.get("rescale_factor", 1 / 255) if about.get("do_rescale", True) else 1.0
    scale = 255 * factor
    if abs(scale - 1) > 1e-6:
        mean, std = (tuple(each / scale for each in values) for values in (mean, std))
    return mean, std
