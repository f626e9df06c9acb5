"""Which model stands in a state dict: what its keys, its shapes and the files beside it say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hvit_jax.architectures import MODELS, covered
from hvit_jax.config import Rope, ViTConfig, as_pair
from hvit_jax.convert.authors_layouts import TIMM
from hvit_jax.convert.keys import PERIODS, Entry, Form
from hvit_jax.convert.reader import StateDict
from hvit_jax.errors import InputError

# Heads that are usual for a width, where nothing tells.
_HEADS = {
    **{192: 3, 256: 4, 320: 5, 384: 6, 512: 8, 640: 10, 768: 12, 896: 14, 1024: 16, 1152: 16},
    **{1280: 16, 1408: 16, 1536: 16, 1664: 16, 4096: 32},
}
_GATED_HEADS = {1280: 20, 1536: 24}  # Of DINOv3's H+ and DINOv2's giant.
_SCALE = "blocks/ls_1"
_HEAD_DIM = 64  # Of CLIP's and Segmenter's models of other widths.
_SIDE = 224  # Pixels, where nothing tells.
# Sizes that shapes tell, by the letters of `Entry`.
_LETTERS = {
    **{"depth": "depth", "width": "C", "mlp_width": "M", "patch_size": "p", "registers": "R"},
    **{"num_classes": "K", "projection": "V"},
}


@dataclass(frozen=True)
class Stated:
    """What is known of a model beside its weights.

    Attributes:
        switches: fields of `ViTConfig`; `resolution` may leave a rest that no patch covers.
        where: what states each of them, for messages; "config.json" where nothing is noted.
        layout: what a folder's files call the layout; None: nothing does.
        usual: fields that count where neither keys nor shapes tell them.
    """

    switches: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, str] = field(default_factory=dict)
    layout: str | None = None
    usual: Mapping[str, Any] = field(default_factory=dict)

    def source(self, name: str) -> str:
        """Say what states a field."""
        return self.where.get(name, "config.json")


def check_sizes(name: str, sizes: Mapping[str, int], stated: Stated) -> None:
    """Compare sizes with what is stated.

    Args:
        name: what to call the file in errors.
        sizes: read off the shapes, by the letters of `Entry`, with "depth".
        stated: what is known beside the weights.

    Raises:
        InputError: that names what states a size, and what the arrays have.
    """
    for field_name, letter in _LETTERS.items():
        said, found = stated.switches.get(field_name), sizes.get(letter)
        if None not in (said, found) and said != found:
            raise InputError(
                f"{stated.source(field_name)} says {field_name} {said}, but the arrays of {name} "
                f"have {found}"
            )


def found_switches(
    form: Form, rows: Collection[Entry], sizes: Mapping[str, int], stated: Stated
) -> dict[str, Any]:
    """Find the switches of a model.

    Args:
        form: the layout as it stands in the file.
        rows: those of its rows that the file has a key of.
        sizes: read off the shapes, by the letters of `Entry`.
        stated: what is known beside the weights, which wins.

    Returns:
        Every switch of `ViTConfig` that tells which parameters there are, and some of the others.
    """
    paths = {row.path for row in rows}

    def has(path: str) -> bool:
        return any(each == path or each.startswith(f"{path}/") for each in paths)

    halves = any(row.part for row in rows if row.path.startswith("blocks/linear_1/"))
    found = {
        "class_token": has("class_token"),
        "distillation_token": has("distillation_token"),
        "registers": sizes.get("R", 0),
        # Of the models of one table of keys, those without positions have both of the others.
        "position_embedding": has("pos_embedding") or not (has("register_tokens") and has(_SCALE)),
        "pre_norm": has("ln_pre"),
        "patch_bias": has("patch_embed/bias") or not has("ln_pre"),
        "qkv_bias": _bias([row for row in rows if row.path == "blocks/in_proj/bias"]),
        "qk_norm": has("blocks/q_norm"),
        "layer_scale": has(_SCALE),
        "gated": halves or sizes.get("H") == 2 * sizes.get("M", 0),
        "mlp_norm": has("blocks/mlp_ln"),
        "final_norm": has("ln") or not has("pooled_ln"),
        "pooled_norm": has("pooled_ln"),
        "num_classes": sizes.get("K", 0),
        "projection": sizes.get("V", 0),
    }
    if has("pool"):
        found["pool"] = "map"
    elif has("distillation_head"):
        found["pool"] = "two heads"
    elif sizes.get("F") == 2 * sizes.get("C", 0):
        found["pool"] = "cls+avg"
    else:
        found["pool"] = "avg" if has("pooled_ln") or not found["class_token"] else "cls"
    more = form.layout.classifying if found["num_classes"] else {}
    layout = form.layout
    switches = {**found, **layout.usual, **layout.switches, **more, **stated.switches}
    rotary = layout.name == TIMM.name and not switches["position_embedding"]
    if rotary and "pool" not in stated.switches:
        switches["pool"] = "avg"  # As timm's DINOv3 gives.
    return switches


def _bias(rows: Iterable[Entry]) -> str:
    """Tell which of q, k and v have a bias, by the rows of the biases."""
    rows = list(rows)
    if not rows:
        return "none"
    whole = any(row.part is None for row in rows) or any(row.key_bias for row in rows)
    return "all" if whole and not any(row.mask for row in rows) else "qv"


def complete(
    read: StateDict,
    form: Form,
    switches: Mapping[str, Any],
    sizes: Mapping[str, int],
    stated: Stated,
) -> tuple[ViTConfig, dict[str, str]]:
    """Build the configuration of a model whose keys and shapes are in order.

    Args:
        read: the state dict.
        form: the layout as it stands in it.
        switches: as `found_switches` gives them.
        sizes: of every letter of `Entry` that the model has, and "depth".
        stated: what is known beside the weights.

    Returns:
        The configuration, and what was guessed, by the option that says it.

    Raises:
        InputError: if the keys leave open what no rule tells, or sizes do not fit each other.
    """
    assumed: dict[str, str] = {}
    known = {**stated.usual, **switches}
    resolution, prefix = _resolution(read.name, form, known, sizes, stated, assumed)
    heads = _heads(read, form, known, sizes, assumed)
    head_dim = sizes["C"] // max(1, heads)  # The configuration refuses 0.
    if sizes.get("D", head_dim) != head_dim:
        raise InputError(
            f"{stated.source('heads')} says heads {heads}, of {head_dim} channels, but the arrays "
            f"of {read.name} have heads of {sizes['D']}"
        )
    if "activation" not in known:
        known["activation"] = _activation(read, known)
        assumed["activation"] = f"activation {known['activation']}"
    if "norm_eps" not in known:
        known["norm_eps"] = 1e-5 if known["pre_norm"] or not known["position_embedding"] else 1e-6
        assumed["norm_eps"] = f"norm_eps {known['norm_eps']:g}"
    hidden = sizes.get("N", sizes["M"])
    fields = {
        "pool_mlp_width": 0 if hidden == sizes["M"] else hidden,
        "position_resizing": form.layout.resizing[known["registers"] > 0],
        **known,
        **{"resolution": resolution, "position_prefix": prefix, "heads": heads},
        **{"patch_size": sizes["p"], "depth": sizes["depth"], "width": sizes["C"]},
        **{"mlp_width": sizes["M"], "rope": _rope(read, form, known, head_dim)},
    }
    try:
        return ViTConfig(**fields), assumed
    except InputError as error:
        raise InputError(f"{read.name}: {error}") from error


def _activation(read: StateDict, switches: Mapping[str, Any]) -> str:
    if switches["gated"]:
        return "silu"
    if "input_resolution" in read.shapes:  # Only OpenAI's own CLIP has this beside its weights.
        return "quick_gelu"
    return "gelu_tanh" if switches["pool"] == "map" else "gelu"


def _rope(read: StateDict, form: Form, switches: Mapping[str, Any], head_dim: int) -> Rope | None:
    """Find the rotary positions; the periods of the file, if it has them, come first.

    Raises:
        InputError: for a model with a table of positions that has rotary ones too, or not: no key
            tells.
    """
    if "rope" in switches:
        rope = switches["rope"]
    elif not switches["position_embedding"]:
        rope = Rope.spaced(head_dim)
    else:
        _refuse_unknown_rope(read.name, switches)
        rope = None
    periods = _periods(read, form)
    return dataclasses.replace(rope, periods=periods) if rope and periods else rope


def _refuse_unknown_rope(name: str, switches: Mapping[str, Any]) -> None:
    eva = switches["mlp_norm"] or switches["qkv_bias"] == "qv"
    perception = switches["pre_norm"] and switches["pool"] == "map"
    if eva or perception:
        raise InputError(
            f"{name} is of the family of {'EVA' if eva else 'PE'}, where no key tells whether "
            "there are rotary positions; say which model it is with --architecture NAME, as timm "
            "calls it (in Python: architecture=)"
        )


def _periods(read: StateDict, form: Form) -> tuple[float, ...]:
    """Read the periods of rotary positions, where the file has them."""
    keys = [form.key(row) for row in form.layout.entries if row.path == PERIODS]
    found = [read.read(key).ravel() for key in keys if key in read.shapes]
    return tuple(found[0].tolist()) if found else ()


def _heads(
    read: StateDict,
    form: Form,
    switches: Mapping[str, Any],
    sizes: Mapping[str, int],
    assumed: dict[str, str],
) -> int:
    """Find the number of attention heads, which no array has."""
    body = {"depth": sizes["depth"], "width": sizes["C"], "mlp_width": sizes["M"]}
    if "heads" in switches:
        return switches["heads"]
    periods = _periods(read, form)
    if "D" in sizes or periods:
        return max(1, body["width"] // sizes.get("D", 4 * len(periods)))
    if form.layout.family in ("SWAG", "torchvision") and (heads := published_heads(**body)):
        return heads
    usual = {**_HEADS, **(_GATED_HEADS if switches["gated"] else {})}
    heads = usual.get(body["width"])
    by_width = form.layout.family in ("CLIP", "Segmenter") and body["width"] % _HEAD_DIM == 0
    if heads is None and by_width:
        heads = body["width"] // _HEAD_DIM
    if heads is None:
        raise InputError(
            f"{read.name} has {body['depth']} blocks of width {body['width']} and MLP width "
            f"{body['mlp_width']}, which is no published size, and files do not store the number "
            "of attention heads; give it with --heads N (in Python: heads=N)"
        )
    assumed["heads"] = f"{heads} heads"
    return heads


def published_heads(*, depth: int, width: int, mlp_width: int) -> int | None:
    """Look up the attention heads of SWAG's models by their size; None if it is none of them."""
    body = depth, width, mlp_width
    known = {(size.depth, size.width, size.mlp_width): size.heads for size in MODELS.values()}
    return known.get(body)


def _resolution(
    name: str,
    form: Form,
    switches: Mapping[str, Any],
    sizes: Mapping[str, int],
    stated: Stated,
    assumed: dict[str, str],
) -> tuple[tuple[int, int], int]:
    """Find the native resolution, and how many tokens before the patches the table covers."""
    side, given = sizes["p"], stated.switches.get("resolution")
    if not switches["position_embedding"]:
        if given is None and "resolution" not in stated.usual:
            assumed["resolution"] = f"{_SIDE} x {_SIDE} pixels"
        given = given or stated.usual.get("resolution", _SIDE)
        return _cut(given, side, stated), 0
    before = switches["class_token"] + switches["distillation_token"]
    if "position_prefix" in switches:
        prefixes = [switches["position_prefix"]]
    elif form.layout.switches:
        prefixes = [before]
    else:  # No two of timm's models agree: none, all, or CLS alone.
        prefixes = list(dict.fromkeys((0, before + switches["registers"], before)))
    for prefix in prefixes:
        square = math.isqrt(max(sizes["S"] - prefix, 0)) * side
        height, width = _cut(square if given is None else given, side, stated)
        patches = (height // side) * (width // side)
        if patches == sizes["S"] - prefix and patches:
            return (height, width), prefix
    rows, columns = (each // side for each in as_pair(given or 0))
    grid = f"{rows} x {columns}" if given else "a square grid of"
    said = f" as {stated.source('resolution')} says" if given else ""
    words = {0: "", 1: "1 for CLS and "}.get(prefixes[-1], f"{prefixes[-1]} for other tokens and ")
    raise InputError(
        f"{name} has {sizes['S']} positions; expected {words}{grid} patches{said}; another grid is "
        "given in pixels with --resolution HEIGHT,WIDTH (in Python: resolution=)"
    )


def _cut(resolution: int | tuple[int, int], side: int, stated: Stated) -> tuple[int, int]:
    """Cut off what no whole patch covers, as libraries do, but not of what the user gave."""
    if stated.source("resolution") == "--resolution":
        return as_pair(resolution)
    return covered(resolution, side)
