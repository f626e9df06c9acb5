"""Heads that make maps: which one stands in a state dict, and what its arrays do not say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hvit_jax.config import Decoder, ViTConfig
from hvit_jax.convert.dense_layouts import HEAD
from hvit_jax.convert.keys import Entry, Form
from hvit_jax.convert.reader import StateDict
from hvit_jax.convert.switches import Stated
from hvit_jax.convert.variant import DATA_SETS, usual_windows
from hvit_jax.errors import InputError
from hvit_jax.pictures import Windows

# Which parameters only one kind of decoder has.
_MARKS = {
    "mask": {"class_tokens", "patch_projection", "class_projection", "blocks", "proj", "mask_norm"},
    "depth_dpt": {"readout", "project", "convs", "fusion", "smooth", "head_0", "head_1", "head_2"},
    "bn_linear": {"mean", "variance", "scale"},
}
# The one layer of the others, by the variant of its row.
_LAYERS = {"": "linear", "conv_seg": "bn_linear", "conv_depth": "depth_linear"}
_ON_TAPS = ("bn_linear", "depth_linear", "depth_dpt")
_DEPTH_24 = (4, 11, 17, 23)  # The blocks that are read for depth, where no rule gives them.
_METRES = {"kitti": 80.0, "nyu": 10.0}  # The largest depth, by what is in a file's name.
_LEAST = 0.001  # The smallest depth of all heads, in metres.
_NAMED = re.compile(r"_(linear4|linear|ms|dpt)_head")
_TAPS_OF = {"linear": 1, "linear4": 4, "ms": 4, "dpt": 4}
# As DINOv2's segmentation heads are run; a window is padded to whole patches.
_DINOV2_WINDOWS = Windows(short_side=512, window=512, stride=341)


def join_head(read: StateDict, head: StateDict) -> StateDict:
    """Put a head beside the backbone that it was trained on.

    Args:
        read: the backbone.
        head: of a file of its own.

    Raises:
        InputError: if the file holds no head, or more, or the backbone has one already.
    """
    name = Path(head.name).name
    if surplus := [key for key in head.shapes if not key.startswith((HEAD, "auxiliary_head."))]:
        raise InputError(
            f"{head.name} holds more than a head, or none: {surplus[0]}; the keys of a head start "
            f"with {HEAD}; a model that is whole is converted without --head"
        )
    if own := [key for key in read.shapes if key.startswith(HEAD)]:
        raise InputError(f"{read.name} has a head of its own, {own[0]}; leave out --head {name}")
    said = {**read.said, "head": {"file": name, "sha256": head.sha256}}
    if narrowed := head.said.get("narrowed"):
        said["narrowed"] = narrowed
    return dataclasses.replace(
        read,
        shapes={**read.shapes, **head.shapes},
        flaws={**read.flaws, **head.flaws},
        numbers={**read.numbers, **head.numbers},
        said=said,
    )


def head_file(read: StateDict) -> str:
    """Name the file that a head is in."""
    return read.said.get("head", {}).get("file", read.name)


def found_decoder(
    read: StateDict,
    form: Form,
    rows: Collection[Entry],
    sizes: Mapping[str, int],
    stated: Stated,
) -> tuple[Decoder | None, dict[str, str]]:
    """Find the decoder of a model.

    Args:
        read: the state dict.
        form: the layout as it stands in it.
        rows: those of its rows that the file has a key of.
        sizes: read off the shapes, by the letters of `Entry`, with the depths of stacks of blocks.
        stated: what is known beside the weights.

    Returns:
        The decoder, None without one, and what was guessed, by the option that says it.

    Raises:
        InputError: if it does not fit the backbone, or contradicts what is stated.
    """
    paths = {row.path for row in rows}
    kind = _kind(form, {path.split("/")[1] for path in paths if path.startswith("decoder/")})
    _refuse_options(read, kind, stated)
    if kind is None:
        return None, {}
    said, assumed = dict(stated.switches.get("decoder") or {}), {}
    found: dict[str, Any] = {"kind": kind, "outputs": sizes.get("O", 1)}
    if kind == "mask":
        width = sizes.get("C", 1)
        found |= {"depth": sizes["decoder/blocks"], "heads": said.get("heads", max(1, width // 64))}
    if kind == "depth_dpt":
        made = tuple(sizes.get(letter, 1) for letter in "abcd")
        found |= {"outputs": 1, "channels": sizes.get("U", 1), "tap_channels": made}
    _compare(read, found, said, stated)
    if kind in _ON_TAPS:
        found["taps"] = _taps(read, kind, sizes, said.get("taps"), assumed)
    if kind.startswith("depth"):
        if "class_token" not in paths:
            head = head_file(read)
            raise InputError(f"the head {head} reads a CLS token, which {read.name} does not have")
        found["depth_range"] = _range(read, kind, said, assumed)
    return Decoder(**{**said, **found}), assumed


def _kind(form: Form, names: set[str]) -> str | None:
    """Tell the kind of a decoder by its parameters, some of which may be missing."""
    if not names:
        return None
    marked = [kind for kind, marks in _MARKS.items() if names & marks]
    return marked[0] if marked else _LAYERS[form.chosen("decoder/linear/kernel")]


def _refuse_options(read: StateDict, kind: str | None, stated: Stated) -> None:
    """Refuse what the user says of a head that there is none of."""
    fitting = {"taps": kind in _ON_TAPS, "depth_range": str(kind).startswith("depth")}
    for name, fits in fitting.items():
        if name in stated.where and not fits:
            has = "no head" if kind is None else f"one of the kind {kind}"
            what = "read blocks" if name == "taps" else "estimate depth"
            raise InputError(
                f"{stated.source(name)} is for heads of DINOv2's that {what}; {read.name} has {has}"
            )


def _compare(
    read: StateDict, found: Mapping[str, Any], said: Mapping[str, Any], stated: Stated
) -> None:
    """Compare a decoder with what is stated."""
    for name in ("kind", "outputs", "depth"):
        if name in said and name in found and said[name] != found[name]:
            raise InputError(
                f"{stated.source('decoder')} says decoder {name} {said[name]}, but the arrays of "
                f"{read.name} have {found[name]}"
            )


def _taps(
    read: StateDict,
    kind: str,
    sizes: Mapping[str, int],
    given: tuple[int, ...] | None,
    assumed: dict[str, str],
) -> tuple[int, ...]:
    """Find the blocks that a head reads, which its arrays do not say."""
    file, width, depth = head_file(read), sizes.get("C", 1), sizes["depth"]
    whole = kind == "depth_dpt"
    channels = sizes.get("W" if whole else "J", width)
    count, rest = (4, channels - width) if whole else divmod(channels, width)
    if rest or (given is None and count not in (1, 4)):
        reads = f"{channels} channels" + " of each tap" * whole
        right = f"{width}" if whole else f"{width} of one block, or {4 * width} of four"
        raise InputError(
            f"the head {file} does not fit the backbone {read.name}: it reads {reads}, and "
            f"the backbone gives {right}"
        )
    named = _NAMED.search(file)
    if named and given is None and _TAPS_OF[named[1]] != count:
        raise InputError(
            f"the head {file} does not fit the backbone {read.name}: by its name it reads "
            f"{_TAPS_OF[named[1]]} blocks, by its arrays and the backbone's width {count}"
        )
    if given is not None:
        if len(given) != count:
            raise InputError(f"taps names {len(given)} blocks, but the head {file} reads {count}")
        return tuple(given)
    taps = usual_taps(kind, count, depth)
    if count > 1 and depth not in (12, 24, 40):
        assumed["taps"] = f"taps {', '.join(map(str, taps))}"
    return taps


def usual_taps(kind: str, count: int, depth: int) -> tuple[int, ...]:
    """Give the blocks that DINOv2's heads read: the last ones, or of the whole depth for depth.

    Args:
        kind: of the head, as `Decoder` names it.
        count: how many it reads.
        depth: of the backbone.
    """
    if count == 1 or kind == "bn_linear":
        return tuple(range(max(0, depth - count), depth))
    if (count, depth) == (len(_DEPTH_24), 24):
        return _DEPTH_24
    return tuple((step + 1) * depth // count - 1 for step in range(count))


def _range(
    read: StateDict, kind: str, said: Mapping[str, Any], assumed: dict[str, str]
) -> tuple[float, float]:
    """Find the least and largest depth, which arrays do not say."""
    if "depth_range" in said:
        return said["depth_range"]
    if kind == "depth_linear":  # Both of the published, whatever they were trained on.
        return _LEAST, 80.0
    known = [most for word, most in _METRES.items() if word in head_file(read).lower()]
    if not known:
        assumed["depth_range"] = f"depth range {_LEAST} to {_METRES['nyu']:g} m"
    return _LEAST, known[0] if known else _METRES["nyu"]


def windows_of(config: ViTConfig) -> tuple[str | None, Windows]:
    """Give the usual windows of a model whose files do not say, and its data set by its classes."""
    decoder = config.decoder
    if decoder is None or decoder.task == "depth":
        return None, Windows()
    if decoder.taps:
        return None, _DINOV2_WINDOWS
    data_set = DATA_SETS.get(decoder.outputs)
    height, width = config.image_shape
    return data_set, usual_windows(data_set, height if height == width else (height, width))
