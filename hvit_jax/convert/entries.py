"""Which models a file holds, whatever dicts and prefixes stand around their keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvit_jax.convert.dense_layouts import HEADS, OF_HEADS, SEGMENTER
from hvit_jax.convert.layouts import LAYOUTS
from hvit_jax.errors import InputError, unknown

# Of several models the first of these is taken: averaged weights, as timm takes them.
_PREFERRED = (
    *("state_dict_ema", "model_ema", "ema_model", "ema", "teacher", "target_encoder"),
    *("state_dict", "model", "module"),
)
# What PyTorch writes into keys, anywhere, where a module or a part of it was wrapped.
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Counters of PyTorch's AveragedModel; no weights.
_IGNORED = ("n_averaged",)
# A model is where one of these keys is; what stands before it is the prefix of all its keys.
_ANCHORS = {
    re.escape(entry.key.format(root=root))
    for layout in LAYOUTS
    for entry in layout.entries
    for root in layout.names.get("root", ("",))
    if entry.path in layout.anchors
} | {re.escape(entry.key) for entry in HEADS if entry.path in OF_HEADS}
_ANCHOR = re.compile(rf"((?:.*?\.)??)(?:{'|'.join(sorted(_ANCHORS))})", re.DOTALL)
# A decoder's keys; an encoder beside it is a part of the same model.
_DECODERS = [row.key for row in SEGMENTER.entries if row.path in SEGMENTER.anchors]
# Blocks in groups: the first number is the group's, the second one counts through all of them.
_CHUNK = re.compile(r"\bblocks\.(\d+)\.(\d+)\.(?=(norm1|attn|ls1|norm2|mlp|ls2)\.)")
_DEPTH = 3  # Dicts within dicts that are looked into.


def choose_model(
    path: Path, top: Any, wanted: str | None
) -> tuple[dict[str, Any], Mapping, dict[str, Any]]:
    """Take one of the models that a file holds.

    Args:
        path: names the file in errors.
        top: what the file holds.
        wanted: its entry, or the first parts of it, "." for one without a name; None: averaged
            weights before others.

    Returns:
        Its values by key, without prefix and wrappers; the dict that holds them; and what there is
        to say about it: "entry", the names of the dicts around it and the prefix of its keys;
        "other_entries", the file's other models; "beside", what else the file holds, such as the
        state of an optimiser; "ignored", keys in its dict that are no weights; "chunks", groups
        that its blocks are in, whose numbers are left out of the keys.

    Raises:
        InputError: if it holds no dict, nothing under that entry, or a key twice.
    """
    if not isinstance(top, Mapping) or not top:
        raise InputError(
            f"{path} holds {'an empty' if top == {} else 'a'} {type(top).__name__}, "
            "not a state dict; save one with: torch.save(model.state_dict(), PATH)"
        )
    dicts = list(_dicts(top))
    models = {
        ".".join(filter(None, (name, prefix.rstrip(".")))) or ".": (values, prefix)
        for name, values in dicts
        for prefix in _prefixes(values)
    }
    if not models:  # The largest dict stands for one, so that its keys can be named.
        name, values = max(dicts, key=lambda each: len(each[1]))
        models = {name or ".": (values, "")}
    fitting = [name for name in models if wanted in (None, name) or name.startswith(f"{wanted}.")]
    if not fitting:
        raise unknown("entry", str(wanted), models)
    chosen = min(fitting, key=_rank)
    taken, ignored = _take(path, *models[chosen])
    chunks = len({match[1] for match in map(_CHUNK.search, taken) if match})
    taken = {_CHUNK.sub(r"blocks.\2.", key): value for key, value in taken.items()}
    others = [name for name in models if name != chosen]
    said = {"entry": "" if chosen == "." else chosen, "other_entries": others, "ignored": ignored}
    said["chunks"] = chunks
    if models[chosen][0] is not top:
        parts = {name.partition(".")[0] for name in models}
        said["beside"] = [_plain(key) for key in top if str(key) not in parts]
    return taken, models[chosen][0], {name: each for name, each in said.items() if each}


def _rank(entry: str) -> int:
    ranks = [_PREFERRED.index(part) for part in entry.split(".") if part in _PREFERRED]
    return min(ranks, default=len(_PREFERRED))


def _dicts(value: Any, name: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Mapping]]:
    if isinstance(value, Mapping) and depth:
        yield name, value
        for key, inner in value.items():
            yield from _dicts(inner, f"{name}.{key}" if name else str(key), depth - 1)


def _prefixes(values: Mapping) -> dict[str, None]:
    """Find what stands before the keys of each model in a dict, in the dict's order."""
    keys = dict.fromkeys(map(_plain, values))
    found = dict.fromkeys(match[1] for key in keys if (match := _ANCHOR.fullmatch(key)))
    for prefix in list(found):
        if any(f"{prefix}{key}" in keys for key in _DECODERS):
            found.pop(f"{prefix}encoder.", None)
    return found


def _plain(key: Any) -> str:
    """Name a key without wrappers; one that no state dict has is named by its type."""
    return _WRAPPERS.sub("", str(key)) if isinstance(key, str | int) else f"<{type(key).__name__}>"


def _take(path: Path, values: Mapping, prefix: str) -> tuple[dict[str, Any], list[str]]:
    """Take a model's values out of a dict, and those that belong to none of the models in it."""
    taken, ignored, prefixes = {}, [], _prefixes(values)
    for key, value in ((_plain(name), value) for name, value in values.items()):
        if max(filter(key.startswith, prefixes), key=len, default=prefix) != prefix:
            continue  # Another model's.
        key = key.removeprefix(prefix)
        if key in taken:
            raise InputError(f"{path} holds {key} twice, with and without a wrapper's name")
        if key.rpartition(".")[2] in _IGNORED:
            ignored.append(key)
        else:
            taken[key] = value
    return taken, ignored
