"""What a state dict holds: its layout, its model, and everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

from hvit_jax.config import ViTConfig
from hvit_jax.convert.dense_layouts import HEAD
from hvit_jax.convert.heads import found_decoder
from hvit_jax.convert.keys import STACKS, Entry, Form, Layout, Shape
from hvit_jax.convert.layouts import LAYOUTS, NOT_READ
from hvit_jax.convert.reader import StateDict
from hvit_jax.convert.switches import Stated, check_sizes, complete, found_switches
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import abstract_parameters, flatten

_OUTPUTS = ("head/", "distillation_head/", "projection/")
_NAMED = 24  # keys of one kind that a message names
# What a folder's files call layouts that are of one table.
_SAME_TABLE = {
    "timm": ("timm", "OpenCLIP timm"),
    "transformers deit": ("transformers vit",),
    "transformers vit_mae": ("transformers vit",),
    "transformers dinov2_with_registers": ("transformers dinov2",),
    "transformers siglip2": ("transformers siglip",),
}


@dataclass(frozen=True)
class Found:
    """A model that was found in a state dict.

    Attributes:
        form: its layout as it stands there.
        config: its sizes and switches.
        rows: of the layout, those that the model has.
        ignored: what was passed over, such as "mask_token" or "text_model.* (36 keys)".
        assumed: what was guessed, by the option that says it.
    """

    form: Form
    config: ViTConfig
    rows: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()
    assumed: dict[str, str] = field(default_factory=dict)


# Of a layout, the keys that a file has: their rows and block numbers.
_Matches = dict[str, tuple[Entry, int]]


def detect(read: StateDict, stated: Stated, progress: Progress) -> Found:
    """Tell a state dict's layout and model from its keys and shapes, and from what is stated.

    Args:
        read: the state dict.
        stated: what is known beside the weights.
        progress: shows how far the numbers are checked.

    Raises:
        InputError: if it is of no known layout, if keys are missing, left over, misshapen or
            otherwise unusable, all of which are listed, or if it contradicts what is stated.
    """
    form, matches = _choose_form(read, stated)
    _refuse_known(form.layout, read)
    depths = {name: _depth(name, matches) for name in STACKS}
    sizes = {**_vote(read.shapes, matches), **depths, "depth": depths["blocks"]}
    check_sizes(read.name, sizes, stated)
    known = {entry for entry, _ in matches.values()}
    decoder, guessed = found_decoder(read, form, known, sizes, stated)
    if decoder is not None:  # It stands in the place of the backbone's own head.
        sizes = {letter: size for letter, size in sizes.items() if letter not in "KVF"}
    switches = {**found_switches(form, known, sizes, stated), "decoder": decoder}
    if decoder is not None:
        switches |= {"num_classes": 0, "projection": 0}
    rows = form.rows(_paths(read.name, switches), switches["qkv_bias"])
    sizes["h"] = sizes.get("U", 0) // 2
    sizes["H"] = sizes.get("M", 0) * (1 + switches["gated"])
    sizes["F"] = sizes.get("C", 0) * (1 + (switches["pool"] == "cls+avg"))
    expected = {key: entry for key, entry, _ in form.expected(rows, depths)}
    surplus = [key for key in read.shapes if key not in expected]
    ignored = _ignored(form, surplus, of_head=decoder is not None)
    _refuse_problems(read, form, expected, sizes, set().union(*ignored.values()), progress)
    config, assumed = complete(read, form, switches, sizes, stated)
    passed = tuple(keys[0] if len(keys) == 1 else _all_of(keys) for keys in ignored.values())
    return Found(form, config, tuple(rows), passed, guessed | assumed)


def _depth(stack: str, matches: _Matches) -> int:
    """Count the blocks of a stack; those of none, too, are looked for."""
    return 1 + max((number for row, number in matches.values() if row.stack == stack), default=0)


def _all_of(keys: list[str]) -> str:
    start = re.sub(r"[^._]*$", "", os.path.commonprefix(keys))
    return f"{start}* ({len(keys)} keys)"


def _choose_form(read: StateDict, stated: Stated) -> tuple[Form, _Matches]:
    """Find the layout that knows most of a file's keys, and the form that it has there."""
    index = _index(read.shapes)
    forms = [_form(layout, index, read.shapes) for layout in LAYOUTS]
    wanted = _SAME_TABLE.get(stated.layout or "", (stated.layout,))

    def likeness(each: tuple[Form, _Matches]) -> tuple[bool, int, bool, bool]:
        layout, root = each[0].layout, each[0].names.get("root", "")
        key, axes = layout.mark or ("", 0)
        marked = len(read.shapes.get(f"{root}{key}", ())) == axes > 0
        return _anchored(layout, each[1]), len(each[1]), layout.name in wanted, marked

    form, matches = max(forms, key=likeness)
    if not any(entry.stack == "blocks" for entry, _ in matches.values()):
        _refuse_known(None, read)
        if any(key.startswith(HEAD) for key in read.shapes):
            raise InputError(
                f"{read.name} holds a head without its backbone; convert the backbone, and give "
                "this file with --head (in Python: head=)"
            )
        few = ", ".join(list(read.shapes)[:5]) + (", ..." if len(read.shapes) > 5 else "")
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise InputError(
            f"{read.name} is not a vision transformer of a known format ({known}); its keys: {few}"
        )
    if stated.layout and form.layout.name not in wanted:
        raise InputError(
            f"{stated.source('layout')} says that the layout is {stated.layout}, but the keys of "
            f"{read.name} are those of {form.layout.name}"
        )
    return dataclasses.replace(form, chunks=read.said.get("chunks", 0)), matches


def _anchored(layout: Layout, matches: _Matches) -> bool:
    """Tell whether a layout knows the start of a model, which a text tower does not have."""
    return any(row.path in layout.anchors for row, _ in matches.values())


def _index(keys: Iterable[str]) -> dict[str, list[tuple[str, int]]]:
    """List keys by what a row may call them, with `{i}` in the place of any of their numbers."""
    index: dict[str, list[tuple[str, int]]] = {}
    for key in keys:
        index.setdefault(key, []).append((key, 0))
        for number in re.finditer(r"(?<!\d)(0|[1-9]\d{0,2})(?!\d)", key):
            template = f"{key[: number.start()]}{{i}}{key[number.end() :]}"
            index.setdefault(template, []).append((key, int(number[0])))
    return index


def _form(
    layout: Layout, index: Mapping[str, list[tuple[str, int]]], shapes: Mapping[str, Shape]
) -> tuple[Form, _Matches]:
    """Find the names and variants of a layout under which it knows most keys of a file."""
    form = Form.usual(layout)

    def known(rows: Iterable[Entry], form: Form) -> _Matches:
        return {
            key: (row, number)
            for row in rows
            for key, number in index.get(form.key(row, "{i}"), ())
        }

    for name, words in layout.names.items():
        rows = [row for row in layout.entries if f"{{{name}}}" in row.key]
        forms = [dataclasses.replace(form, names={**form.names, name: word}) for word in words]
        fitting = [each for each in forms if known(rows, each)]
        if len(fitting) == 1 or (fitting and name != "head"):  # Two heads are layers of one.
            matches = [known(rows, each) for each in fitting]
            best = max(matches, key=lambda each: (_anchored(layout, each), len(each)))
            form = fitting[matches.index(best)]
    variants: set[str] = set()
    for path in dict.fromkeys(row.path for row in layout.entries):
        ways = {"": 0}
        for row in (row for row in layout.entries if row.path == path):
            axes = len(row.shape.split())
            fitting = [key for key in known([row], form) if len(shapes[key]) == axes]
            ways[row.variant] = ways.get(row.variant, 0) + len(fitting)
        variants.add(max(ways, key=lambda way: ways[way]))
    form = dataclasses.replace(form, variants=frozenset(variants - {""}))
    rows = [row for row in layout.entries if row.variant == form.chosen(row.path)]
    return form, known(rows, form)


_SIZE = re.compile(r"(\d*)([A-Za-z]*)")


def _vote(shapes: Mapping[str, Shape], matches: _Matches) -> dict[str, int]:
    """Read sizes off the shapes; the most frequent value wins, so that one bad array stands out."""
    votes: dict[str, Counter[int]] = {}
    for key, (entry, _) in matches.items():
        words = entry.shape.split()
        if len(words) != len(shapes[key]):
            continue
        for word, size in zip(words, shapes[key], strict=True):
            times, letters = _SIZE.fullmatch(word).groups()  # type: ignore[union-attr]
            share, rest = divmod(size, int(times or 1))
            share = math.isqrt(share) if letters == "pp" else share
            if letters and not rest:
                votes.setdefault(letters[0], Counter())[share] += 1
    return {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}


def _size(word: str, sizes: Mapping[str, int]) -> int | None:
    """Say how long an axis must be; None if that is not known."""
    times, letters = _SIZE.fullmatch(word).groups()  # type: ignore[union-attr]
    if not letters:
        return int(times)
    size = sizes.get(letters[0])
    return None if size is None else int(times or 1) * size ** len(letters)


def _paths(name: str, switches: Mapping[str, Any]) -> set[str]:
    """Name the parameters of a model with these switches, whatever its sizes."""
    counts = ("num_classes", "registers", "projection")
    small = {each: min(1, switches[each]) for each in counts}
    decoder = switches["decoder"]
    if decoder is not None:
        taps = (0,) * len(decoder.taps)
        decoder = dataclasses.replace(decoder, taps=taps, depth=min(1, decoder.depth), heads=1)
    ones = dict.fromkeys(("resolution", "patch_size", "depth", "width", "heads", "mlp_width"), 1)
    rest = {"position_prefix": 0, "rope": None, "pool_heads": 0, "pool_mlp_width": 0}
    rest["decoder"] = decoder
    try:
        config = ViTConfig(**{**switches, **small, **ones, **rest})
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return set(flatten(abstract_parameters(config)))


def _ignored(form: Form, surplus: list[str], *, of_head: bool) -> dict[str, list[str]]:
    """Find the keys that are passed over on purpose, by pattern; with those of a head if asked."""
    root = form.names.get("root", "")
    heads = [row for row in form.layout.entries if of_head and row.path.startswith(_OUTPUTS)]
    ignored: dict[str, list[str]] = {}
    for key in surplus:
        beside = form.layout.beside if root and not key.startswith(root) else ()
        inside = key.removeprefix(root)
        for pattern in (*form.layout.ignored, *beside, *map(re.escape, map(form.key, heads))):
            if re.fullmatch(pattern, key, re.DOTALL) or re.fullmatch(pattern, inside, re.DOTALL):
                ignored.setdefault(pattern, []).append(key)
                break
    return ignored


def _refuse_known(layout: Layout | None, read: StateDict) -> None:
    """Refuse a file by what it is, where its keys tell."""
    known = {**NOT_READ, **(layout.refused if layout else {})}
    for pattern, words in known.items():
        for key in read.shapes:
            if re.fullmatch(pattern, key, re.DOTALL):
                raise InputError(f"{read.name} holds {words}; its keys: {key}, ...")


def _refuse_problems(
    read: StateDict,
    form: Form,
    expected: Mapping[str, Entry],
    sizes: Mapping[str, int],
    ignored: set[str],
    progress: Progress,
) -> None:
    """Raise one error that lists everything that is wrong with a file's keys and numbers."""
    shapes = read.shapes
    surplus = [key for key in shapes if key not in expected and key not in ignored]
    head = form.names.get("head", "head").partition(".")[0]
    layers = [key for key in surplus if key.startswith(f"{head}.")]
    usable = [key for key in expected if key in shapes and not expected[key].mask]
    flaws = {key: read.flaw(key) for key in progress.track(usable, description="checking numbers")}
    problems = {
        "missing": [key for key in expected if key not in shapes],
        "left over": [key for key in surplus if key not in layers],
        "of a head with more layers than the one that is read": layers,
        "wrong shape": list(_misshapen(shapes, expected, sizes)),
        "unusable": [f"{key} {flaw}" for key, flaw in flaws.items() if flaw],
    }
    text = [f"{kind}: {_named(keys)}" for kind, keys in problems.items() if keys]
    if text:
        raise InputError(
            f"{read.name} does not hold a whole {form.layout.name} model; {'; '.join(text)}"
        )


def _named(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def _misshapen(
    shapes: Mapping[str, Shape], expected: Mapping[str, Entry], sizes: Mapping[str, int]
) -> Iterator[str]:
    for key, entry in expected.items():
        right = [_size(word, sizes) for word in entry.shape.split()]
        if key not in shapes or list(shapes[key]) == right:
            continue
        why = _why(entry, shapes[key], sizes)
        yield f"{key} is {shapes[key]}, not ({', '.join(map(str, right))}){why}"


def _why(entry: Entry, shape: Shape, sizes: Mapping[str, int]) -> str:
    """Say what a wrong shape means, where that is known."""
    if entry.path == "patch_embed/kernel" and len(shape) == 4 and shape[2] != shape[3]:
        return "; patches must be square"
    if entry.path == "head/kernel" and len(shape) == 2 and shape[1] > 2 * sizes.get("C", shape[1]):
        return f"; it reads {shape[1] / sizes['C']:g} features, while 1 or 2 are read here"
    return ""
