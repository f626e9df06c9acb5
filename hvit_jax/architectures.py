"""Models by name: SWAG's three, and every plain vision transformer of timm."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hvit_jax.config import Rope, ViTConfig, as_pair
from hvit_jax.errors import InputError

MODELS = {name: getattr(ViTConfig, name)() for name in ("vit_b16", "vit_l16", "vit_h14")}
# What timm's classes take for arguments that an architecture does not name.
_VIT = {
    **{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    **{"global_pool": "token", "class_token": True, "reg_tokens": 0, "no_embed_class": False},
    **{"pos_embed": "learn", "pre_norm": False, "final_norm": True, "fc_norm": None},
    **{"qkv_bias": True, "qk_norm": False, "init_values": None, "norm_layer": None},
    **{"act_layer": "gelu", "mlp_layer": None, "pool_include_prefix": False},
}
_EVA = {
    **{"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    **{"global_pool": "avg", "class_token": True, "num_reg_tokens": 0, "no_embed_class": False},
    **{"use_abs_pos_emb": True, "use_rot_pos_emb": False, "rope_type": "cat"},
    **{"rope_temperature": 10000.0, "rope_rotate_half": False, "rope_grid_offset": 0.0},
    **{"rope_grid_indexing": "ij", "ref_feat_shape": None, "use_fc_norm": None},
    **{"use_pre_transformer_norm": False, "use_post_transformer_norm": None},
    **{"qkv_bias": True, "attn_type": "eva", "qk_norm": False, "init_values": None},
    **{"swiglu_mlp": False, "swiglu_align_to": 0, "scale_mlp": False, "norm_layer": None},
    **{"attn_pool_num_heads": None, "attn_pool_mlp_ratio": None},
}
_DEFAULTS = {"vit": _VIT, "deit_distilled": _VIT, "eva": _EVA}
# Arguments that must have this value, and what another one would need.
_NEEDS = {
    "in_chans": (3, "pictures of other than three channels"),
    "block_fn": ("Block", "blocks of another order: parallel branches, or norms after them"),
    "use_post_norm": (False, "norms after each branch"),
    "attn_layer": ("Attention", "differential attention"),
    "num_kv_heads": (None, "fewer heads for keys and values than for queries"),
    "scale_attn_norm": (False, "a norm within attention"),
    "scale_attn_inner": (False, "a norm within attention"),
    "scale_mlp_norm": (False, "a norm within the MLP"),
    "attn_only_layer_scale": (False, "LayerScale on attention alone"),
    "proj_bias": (True, "an attention without bias on its output"),
    "embed_norm_layer": (None, "a norm within the patch embedding"),
}
# Arguments that change nothing in a model at evaluation, or not its parameters.
_WITHOUT_EFFECT = {
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "weight_init", "fix_init", "head_init_scale", "dynamic_img_size"),
    *("dynamic_img_pad", "strict_img_size", "qkv_fused", "rope_shift_coords"),
    *("rope_jitter_coords", "rope_rescale_coords"),
}
# What timm and transformers call the activations.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_tanh", "gelu_pytorch_tanh", "gelu_new"), "gelu_tanh"),
    **dict.fromkeys(("quick_gelu", "quickgelu"), "quick_gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
}


@dataclass(frozen=True)
class Weights:
    """Published weights of a model.

    Attributes:
        tag: what they are called among the model's; timm writes it after the name and a dot.
        found: their model card on the Hugging Face hub, or a page; None: never published.
        licence: of the weights; None: not known.
        classes: outputs of their head; 0: none.
        resolution: height and width that they were trained at last.
    """

    tag: str
    found: str | None
    licence: str | None
    classes: int
    resolution: tuple[int, int]


@functools.cache
def _read(file: str) -> dict[str, Any]:
    return json.loads(importlib.resources.files("hvit_jax").joinpath(file).read_text("utf-8"))


def architectures() -> tuple[str, ...]:
    """Name timm's plain vision transformers, those that cannot be built too."""
    return tuple(_read("timm_architectures.json"))


def weights_of(name: str) -> tuple[Weights, ...]:
    """List the published weights of a model, the usual ones first.

    Raises:
        InputError: for an unknown name.
    """
    rows = _read("published_weights.json")["weights"].get(name)
    if rows is None:
        raise _unknown(name)
    return tuple(Weights(**{**row, "resolution": tuple(row["resolution"])}) for row in rows)


def other_cards(name: str) -> tuple[str, ...]:
    """List model cards of a model's weights as transformers writes them."""
    return tuple(_read("published_weights.json")["transformers"].get(name, ()))


def published_parameters(name: str) -> int:
    """Look up how many numbers a model has, with the head of its usual weights."""
    return _read("published_weights.json")["parameters"][name]


def architecture_config(
    name: str,
    *,
    num_classes: int | None = None,
    resolution: int | tuple[int, int] | None = None,
    **model_args: Any,
) -> ViTConfig:
    """Give the configuration of a model of timm.

    Args:
        name: an architecture, such as "vit_base_patch16_clip_224", or one with the tag of its
            weights, such as "vit_base_patch16_clip_224.openai".
        num_classes: outputs of the head; None: those of the tag's weights, or the usual ones.
        resolution: None: that of `img_size`, or else of these weights, as far as whole patches
            cover it.
        **model_args: arguments of timm's class in place of the architecture's, such as
            `num_heads=3`; a `config.json` of timm has them under this name.

    Returns:
        The configuration; tables of positions are resized as timm does.

    Raises:
        InputError: for an unknown name, one that needs what this package does not have, or
            arguments of no effect that is known.
    """
    architecture, _, tag = name.partition(".")
    weights = _tagged(architecture, tag)
    entry = _read("timm_architectures.json")[architecture]
    kind = entry["class"]
    given = {
        "img_size": weights.resolution,
        **_DEFAULTS[kind],
        **{key: value for key, value in entry.items() if key != "class"},
        **model_args,
    }
    if obstacles := list(_obstacles(architecture, kind, given)):
        raise InputError(f"{architecture} cannot be built; it needs {', '.join(obstacles)}")
    try:
        return ViTConfig(
            covered(given["img_size"], given["patch_size"]) if resolution is None else resolution,
            given["patch_size"],
            depth=given["depth"],
            width=given["embed_dim"],
            heads=given["num_heads"],
            num_classes=weights.classes if num_classes is None else num_classes,
            # As timm fits tables to other grids when it loads weights.
            position_resizing="bilinear" if "flexivit" in architecture else "bicubic_antialias",
            norm_eps=_norm(given)[1],
            layer_scale=given["init_values"] is not None,
            qk_norm=given["qk_norm"],
            class_token=given["class_token"],
            **_mlp(given),
            **(_eva(given) if kind == "eva" else _vit(given, distilled=kind == "deit_distilled")),
        )
    except InputError as error:
        raise InputError(f"{architecture}: {error}") from error


def _tagged(architecture: str, tag: str) -> Weights:
    """Find the weights of a tag; without one the usual ones."""
    if architecture not in architectures():
        raise _unknown(architecture)
    known = weights_of(architecture)
    found = [each for each in known if not tag or each.tag == tag]
    if not found:
        tags = ", ".join(each.tag for each in known)
        raise InputError(f"{architecture} has no weights named {tag!r}; it has {tags}")
    return found[0]


def covered(size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Cut a picture's sides to whole patches: SigLIP's patches of 14 leave 6 pixels of 384.

    timm and transformers leave such a rest below and on the right; `Preprocessing.uncovered` is
    where pictures lose it.
    """
    height, width = as_pair(size)
    return height - height % patch_size, width - width % patch_size


def _norm(given: dict[str, Any]) -> tuple[str, float]:
    """Read the kind of the norms, in small letters, and what they add to the variance."""
    norm = given["norm_layer"] or "layernorm"
    if isinstance(norm, str):
        return norm.lower(), 1e-6
    return norm["name"].lower(), norm.get("eps", 1e-6)


def _obstacles(name: str, kind: str, given: dict[str, Any]) -> Iterator[str]:
    """List what a model needs that the configuration has no switch for."""
    for key, (right, words) in _NEEDS.items():
        if given.get(key, right) != right:
            yield words
    if _norm(given)[0] != "layernorm":
        yield "RMSNorm"
    if "radio" in name:
        yield "RADIO's own rule for positions at other resolutions"
    if given.get("rope_type", "cat") not in ("cat", "dinov3"):
        yield f"rotary positions of the kind {given['rope_type']!r}"
    if given["global_pool"] not in ("token", "avg", "map"):
        yield f"global_pool {given['global_pool']!r}"
    elif given.get("pool_include_prefix") and given["global_pool"] == "avg":
        yield "a mean over the tokens before the patches too"
    if str(given.get("act_layer", "gelu")).lower() not in ACTIVATIONS:
        yield f"the activation {given['act_layer']}"
    if _gated_mlp(given) not in (None, "glumlp", "swiglu"):
        yield f"an MLP of the kind {given['mlp_layer']}"
    known = {"img_size", "num_classes", *_DEFAULTS[kind], *_NEEDS, *_WITHOUT_EFFECT}
    yield from (f"the argument {key}" for key in given.keys() - known)


def _gated_mlp(given: dict[str, Any]) -> str | None:
    """Name the MLP where it is not the plain one of two layers."""
    layer = given.get("mlp_layer")
    name = (layer["name"] if isinstance(layer, dict) else layer or "mlp").lower()
    return None if name == "mlp" else name


def _mlp(given: dict[str, Any]) -> dict[str, Any]:
    """Read the MLP: a gated one's width is that of one half."""
    width, kind = int(given["embed_dim"] * given["mlp_ratio"]), _gated_mlp(given)
    if swiglu := given.get("swiglu_mlp", False):
        width += -width % (given["swiglu_align_to"] or 1)
    elif kind == "glumlp":  # timm's GluMlp is given the width of both halves, its SwiGLU of one.
        width //= 2
    activation = "silu" if swiglu else str(given.get("act_layer", "gelu")).lower()
    return {
        "mlp_width": width,
        "gated": swiglu or kind is not None,
        "activation": ACTIVATIONS[activation],
        "mlp_norm": given.get("scale_mlp", False),
    }


def _vit(given: dict[str, Any], *, distilled: bool) -> dict[str, Any]:
    """Read the switches that timm's VisionTransformer names in its own way."""
    pool = given["global_pool"]
    norm_after_pool = pool == "avg" if given["fc_norm"] is None else given["fc_norm"]
    positions = given["pos_embed"] not in ("", "none")
    prefix = given["class_token"] + distilled + given["reg_tokens"]
    return {
        "distillation_token": distilled,
        "registers": given["reg_tokens"],
        "position_embedding": positions,
        "position_prefix": prefix if positions and not given["no_embed_class"] else 0,
        "patch_bias": not given["pre_norm"],
        "pre_norm": given["pre_norm"],
        "qkv_bias": "all" if given["qkv_bias"] else "none",
        "final_norm": given["final_norm"] and not norm_after_pool,
        "pooled_norm": given["final_norm"] and norm_after_pool,
        "pool": "two heads" if distilled else {"token": "cls"}.get(pool, pool),
        "pool_prefix": given["pool_include_prefix"] and pool == "map",
    }


def _eva(given: dict[str, Any]) -> dict[str, Any]:
    """Read the switches that timm's Eva names in its own way."""
    pool, norm_after_pool = given["global_pool"], given["use_fc_norm"]
    norm_after_pool = pool == "avg" if norm_after_pool is None else norm_after_pool
    norm_before = given["use_post_transformer_norm"]
    positions = given["use_abs_pos_emb"]
    prefix = given["class_token"] + given["num_reg_tokens"]
    bias = "all" if given["attn_type"] == "rope" else "qv"  # Its own attention has none on keys.
    return {
        "registers": given["num_reg_tokens"],
        "position_embedding": positions,
        "position_prefix": prefix if positions and not given["no_embed_class"] else 0,
        "rope": _rope(given) if given["use_rot_pos_emb"] else None,
        "patch_bias": not given["use_pre_transformer_norm"],
        "pre_norm": given["use_pre_transformer_norm"],
        "qkv_bias": bias if given["qkv_bias"] else "none",
        "final_norm": not norm_after_pool if norm_before is None else norm_before,
        "pooled_norm": norm_after_pool,
        "pool": {"token": "cls"}.get(pool, pool),
        **(_eva_map(given) if pool == "map" else {}),
    }


def _eva_map(given: dict[str, Any]) -> dict[str, Any]:
    heads, ratio = given["attn_pool_num_heads"], given["attn_pool_mlp_ratio"]
    width, blocks = given["embed_dim"], int(given["embed_dim"] * given["mlp_ratio"])
    hidden = int(width * ratio) if ratio else blocks
    return {
        "pool_heads": 0 if heads in (None, given["num_heads"]) else heads,
        "pool_mlp_width": 0 if hidden == blocks else hidden,
        "pool_prefix": True,
    }


def _rope(given: dict[str, Any]) -> Rope:
    head_dim = given["embed_dim"] // given["num_heads"]
    grid: dict[str, Any] = {}
    if given["rope_type"] == "cat":
        reference = given["ref_feat_shape"]
        reference = None if reference is None else as_pair(reference)
        grid = {"coordinates": "grid", "offset": given["rope_grid_offset"], "reference": reference}
    return Rope.spaced(
        head_dim,
        given["rope_temperature"],
        interleaved=not given["rope_rotate_half"],
        first_axis="x" if given["rope_grid_indexing"] == "xy" else "y",
        **grid,
    )


def named_config(name: str) -> ViTConfig:
    """Look up a model by its name: one of SWAG's three, or one of timm's, with a tag or without.

    Raises:
        InputError: for an unknown name, or a model that cannot be built.
    """
    return MODELS[name] if name in MODELS else _as_named(name)


@functools.cache
def _as_named(name: str) -> ViTConfig:
    """Build a model of timm as its name says, once."""
    return architecture_config(name)


def _unknown(name: str) -> InputError:
    near = difflib.get_close_matches(name, [*MODELS, *architectures()], n=3)
    hint = f", did you mean {' or '.join(near)}?" if near else f"; SWAG's are {', '.join(MODELS)}"
    return InputError(f"unknown model {name!r}{hint} (hvit models lists all)")


# Fields that make a body, in which models of one name are alike whoever wrote their weights.
_BODY = (
    *("patch_size", "depth", "width", "heads", "mlp_width", "patch_bias", "class_token"),
    *("distillation_token", "registers", "position_embedding", "pre_norm", "qkv_bias", "qk_norm"),
    *("layer_scale", "gated", "mlp_norm"),
)


def model_name(config: ViTConfig) -> str:
    """Name the model whose blocks and patches these are, or "custom".

    Of timm's names of one body, such as those of other resolutions or activations, it is the one
    that most other fields agree with; those come last whose weights others publish.
    """
    ours = vars(config)
    for name, known in MODELS.items():
        free = {"resolution": known.resolution, "num_classes": known.num_classes}
        if {**ours, **free} == vars(known):
            return name

    def likeness(name: str) -> tuple[bool, int, bool, int]:
        fields = vars(_as_named(name))
        same = sum(ours[field] == value for field, value in fields.items())
        usual = (weights_of(name)[0].found or "timm/").startswith(("timm/", "http"))
        return usual, same, name.startswith("vit_"), -len(name)

    return max(_bodies().get(_body(config), ()), key=likeness, default="custom")


def _body(config: ViTConfig) -> tuple[Any, ...]:
    return (config.rope is None, *(getattr(config, field) for field in _BODY))


@functools.cache
def _bodies() -> dict[tuple[Any, ...], list[str]]:
    """List timm's models by their bodies."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name in buildable():
        names.setdefault(_body(_as_named(name)), []).append(name)
    return names


@functools.cache
def buildable() -> tuple[str, ...]:
    """Name those of timm's plain vision transformers that can be built."""
    return tuple(name for name in architectures() if why_not(name) is None)


def why_not(name: str) -> str | None:
    """Say what keeps a model of timm from being built; None: nothing."""
    try:
        _as_named(name)
    except InputError as error:
        return str(error)
    return None
