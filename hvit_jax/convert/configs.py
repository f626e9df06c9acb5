"""What a folder of timm, transformers, OpenCLIP or Segmenter says of the model in it."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvit_jax.architectures import ACTIVATIONS, architecture_config, architectures
from hvit_jax.config import Rope, as_pair
from hvit_jax.convert.licences import card_licence
from hvit_jax.convert.pictures import (
    FAMILIES,
    open_clip_preprocessing,
    timm_preprocessing,
    transformers_preprocessing,
)
from hvit_jax.convert.variant import (
    VARIANT,
    data_set_of,
    read_yaml,
    variant_switches,
    variant_windows,
)
from hvit_jax.errors import InputError
from hvit_jax.pictures import Preprocessing, Windows
from hvit_jax.system.files import read_json


@dataclass(frozen=True)
class Facts:
    """What the files beside the weights say.

    Attributes:
        layout: whose keys the weights have: "timm", "OpenCLIP", "Segmenter", or "transformers"
            and its model type, such as "transformers dinov2".
        switches: fields of `ViTConfig` that are stated, those of its decoder in a dict. What shapes
            tell is there only where it is written down, to be compared; `resolution` may leave a
            rest that no whole patch covers.
        preprocessing: how pictures are prepared; None: not said.
        input_size: height and width that this ends in, where they are not the model's own.
        classes: names of the head's outputs, in order; empty: not said.
        licence: of the weights; None: not said.
        windows: how pictures are cut for models that make maps; None: not said.
        file: the name of the file that says so.
        notes: what to tell the user, by a word for each.
    """

    layout: str
    switches: dict[str, Any]
    preprocessing: Preprocessing | None = None
    input_size: tuple[int, int] | None = None
    classes: tuple[str, ...] = ()
    licence: str | None = None
    windows: Windows | None = None
    file: str = "config.json"
    notes: dict[str, str] = field(default_factory=dict)


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
        read = _timm if "architecture" in config else _transformers
    elif (file := folder / "open_clip_config.json").is_file():
        config, read = read_json(file), _open_clip
    elif (file := folder / VARIANT).is_file():
        config, read = read_yaml(file), _segmenter
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
        preprocessing=timm_preprocessing(about),
        input_size=size,
        classes=_distinct(config.get("label_names") or about.get("label_names") or ()),
        licence=about.get("license"),
    )


def _of_architecture(name: str, given: dict[str, Any]) -> Facts:
    """Read what an architecture of timm states, and the arguments given beside it."""
    base = str(name).partition(".")[0]
    if base not in architectures() and (reason := _not_plain(base)):
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


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Tell classes of one name apart by their numbers: ImageNet has two called "crane"."""
    names = [str(name) for name in names]
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)
    )


# Why models of other kinds cannot be read, and how their names begin.
_OTHERS = {
    "its attention is within windows": ("swin", "hiera", "sam", "vitdet"),
    "its positions are biases of the attention": ("beit", "data2vec"),
    "it is a convolutional network": ("convnext", "resnet", "efficientnet", "regnet"),
    "it has stages of several resolutions": (
        *("levit", "pvt", "mvit", "maxvit", "mobilevit", "segformer"),
    ),
    "its last blocks attend from CLS alone": ("cait",),
    "its attention is between channels": ("xcit",),
    "its pictures have sizes of their own": ("naflexvit",),
}


def _not_plain(name: str) -> str | None:
    return next((reason for reason, kinds in _OTHERS.items() if name.startswith(kinds)), None)


# transformers


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


def _transformers(config: dict[str, Any], folder: Path) -> Facts:
    if config.get("quantization_config"):
        raise InputError("its weights are quantised; take the model's own in float32 or float16")
    kind = config.get("model_type")
    if kind is None:
        raise InputError("it names neither an architecture of timm nor a model_type")
    kind = str(kind).removesuffix("_vision_model")
    if kind not in _TYPES:
        known = ", ".join(_TYPES)
        reason = _not_plain(kind)
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
    pictures = transformers_preprocessing(folder, processor, switches.get("resolution"))
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
        f"transformers {kind}", switches, preprocessing, size, _distinct(names), notes=notes
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


# OpenCLIP


def _open_clip(config: dict[str, Any], folder: Path) -> Facts:
    model = config["model_cfg"]
    vision = model["vision_cfg"]
    facts = (_tower if vision.get("timm_model_name") else _visual)(model, vision)
    about = config.get("preprocess_cfg") or {}
    preprocessing = open_clip_preprocessing(about)
    size = as_pair(about.get("size") or facts.switches.get("resolution"))
    return dataclasses.replace(facts, preprocessing=preprocessing, input_size=size)


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


# Segmenter


def _segmenter(config: dict[str, Any], folder: Path) -> Facts:
    net = config["net_kwargs"]
    kind = net.get("normalization")
    said = {"data_set": data_set_of(config), "normalization": kind}
    return Facts(
        "Segmenter",
        variant_switches(net),
        FAMILIES.get(f"Segmenter {kind}"),
        windows=variant_windows(config),
        notes={name: str(value) for name, value in said.items() if value is not None},
    )
