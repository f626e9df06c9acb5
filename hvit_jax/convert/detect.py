"""What a state dict holds: its format, its sizes, and everything that is wrong with it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

from hvit_jax.architectures import MODELS, model_name
from hvit_jax.config import Preprocessing, ViTConfig, crop_share
from hvit_jax.convert.keys import LAYOUTS, PREPROCESSING, Entry, Layout
from hvit_jax.convert.reader import StateDict
from hvit_jax.errors import InputError, unknown

Shape = tuple[int, ...]


def detect(source: StateDict) -> tuple[Layout, dict[str, int]]:
    """Tell a state dict's layout and sizes from its keys and shapes.

    Returns:
        The layout, and its sizes by the letters of `Entry`, with `depth`; K is 0 without a head.

    Raises:
        InputError: if it is of no known format, or if keys are missing, left over, misshapen or
            otherwise unusable; all of them are listed.
    """
    shapes = source.shapes
    layouts = [_with_head(layout, shapes) for layout in LAYOUTS]
    layout = max(layouts, key=lambda layout: len(_matching(layout, shapes)))
    matching = _matching(layout, shapes)
    if not any(number is not None for _, number in matching.values()):
        few = ", ".join(list(shapes)[:5]) + (", ..." if len(shapes) > 5 else "")
        known = ", ".join(known.name for known in LAYOUTS)
        raise InputError(
            f"{source.name} is not a vision transformer of a known format ({known}); "
            f"its keys: {few}"
        )
    sizes = _vote(shapes, matching)
    wanted = dict(expected_keys(layout, sizes))
    surplus = [key for key in shapes if key not in wanted]
    root = layout.heads[0].partition(".")[0]
    layers = [key for key in surplus if key.startswith(f"{root}.")]
    problems = {
        "missing": [key for key in wanted if key not in shapes],
        "left over": [key for key in surplus if key not in layers],
        "of a head with more layers than the one that is read": layers,
        "wrong shape": list(_misshapen(shapes, wanted, sizes)),
        "unusable": [f"{key} {flaw}" for key, flaw in source.flaws.items() if key in wanted],
    }
    text = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if text:
        raise InputError(
            f"{source.name} does not hold a whole {layout.name} model; {'; '.join(text)}"
        )
    return layout, sizes


def _with_head(layout: Layout, shapes: Mapping[str, Shape]) -> Layout:
    """Give a layout the one name that the head has in this file, if it has one."""
    names = [name for name in layout.heads if {f"{name}.weight", f"{name}.bias"} & shapes.keys()]
    return dataclasses.replace(layout, heads=tuple(names)) if len(names) == 1 else layout


def _matching(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, tuple[Entry, int | None]]:
    """Find the keys that a layout knows: their rows and block numbers."""
    found = {}
    for entry in layout.entries:
        key = re.escape(layout.key(entry, "{i}"))
        pattern = re.compile(key.replace(r"\{i\}", r"(0|[1-9]\d{0,2})"))
        for match in filter(None, map(pattern.fullmatch, shapes)):
            found[match[0]] = entry, int(match[1]) if entry.stacked else None
    return found


def _vote(
    shapes: Mapping[str, Shape], matching: Mapping[str, tuple[Entry, int | None]]
) -> dict[str, int]:
    """Read sizes off the shapes; the most frequent value wins, so that one bad array stands out."""
    votes: dict[str, Counter[int]] = {}
    for key, (entry, _) in matching.items():
        letters = entry.shape.split()
        if len(letters) == len(shapes[key]):
            for letter, size in zip(letters, shapes[key], strict=True):
                times, letter = (3, "C") if letter == "3C" else (1, letter)
                if letter.isalpha() and size % times == 0:
                    votes.setdefault(letter, Counter())[size // times] += 1
    numbers = [number for _, number in matching.values() if number is not None]
    sizes = {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}
    return {"K": 0, **sizes, "depth": max(numbers) + 1}


def expected_keys(layout: Layout, sizes: Mapping[str, int]) -> Iterator[tuple[str, Entry]]:
    """List every key that a model has, with its row, in the order of PyTorch's own state dicts."""
    blocks = [entry for entry in layout.entries if entry.stacked]
    for entry in layout.entries:
        if entry.path.startswith("head/") and not sizes["K"]:
            continue
        if not entry.stacked:
            yield layout.key(entry), entry
        elif entry is blocks[0]:
            for number in range(sizes["depth"]):
                yield from ((layout.key(row, number), row) for row in blocks)


def _misshapen(
    shapes: Mapping[str, Shape], wanted: Mapping[str, Entry], sizes: Mapping[str, int]
) -> Iterator[str]:
    values = {**sizes, "3C": 3 * sizes.get("C", 0)}
    for key, entry in wanted.items():
        letters = entry.shape.split()
        right = [int(letter) if letter.isdigit() else values.get(letter) for letter in letters]
        if key in shapes and list(shapes[key]) != right:
            yield f"{key} is {shapes[key]}, not ({', '.join(map(str, right))})"


def config_of(
    name: str, sizes: Mapping[str, int], heads: int | None, grid: tuple[int, int] | None = None
) -> ViTConfig:
    """Build the configuration of a detected model.

    Args:
        name: what to call the file in an error.
        sizes: as `detect` returns them.
        heads: attention heads, which no file stores; None: those of the published size.
        grid: rows and columns of patches; None: as many rows as columns.
    """
    side = math.isqrt(max(sizes["S"] - 1, 0))
    rows, columns = grid or (side, side)
    if rows * columns != sizes["S"] - 1 or not side:
        expected = f"{rows} x {columns}" if grid else "a square grid of"
        raise InputError(
            f"{name} has {sizes['S']} positions; expected 1 for CLS and {expected} patches; "
            "another grid is given with --grid ROWS,COLUMNS (in Python: grid=)"
        )
    body = {"depth": sizes["depth"], "width": sizes["C"], "mlp_width": sizes["M"]}
    heads = published_heads(**body) if heads is None else heads
    if heads is None:
        raise InputError(
            f"{name} has {body['depth']} blocks of width {body['width']} and MLP width "
            f"{body['mlp_width']}, which is no published size, and files do not store the number "
            "of attention heads; give it with --heads N (in Python: heads=N)"
        )
    return ViTConfig(
        resolution=(rows * sizes["p"], columns * sizes["p"]),
        patch_size=sizes["p"],
        heads=heads,
        num_classes=sizes["K"],
        **body,
    )


def published_heads(*, depth: int, width: int, mlp_width: int) -> int | None:
    """Look up the attention heads of a published size; None if it is none."""
    body = depth, width, mlp_width
    known = {(size.depth, size.width, size.mlp_width): size.heads for size in MODELS.values()}
    return known.get(body)


def preprocessing_of(
    name: str | None, file: str, layout: Layout, config: ViTConfig
) -> tuple[str, Preprocessing]:
    """Find how pictures are prepared, and the name of that; without one it is assumed.

    torchvision has SWAG's weights under its own keys. Its own are all of 224 pixels; SWAG's of that
    size have "swag" in their file's name.
    """
    own = config.image_shape == (224, 224) and "swag" not in file.lower()
    name = name or (layout.preprocessing if own else "swag")
    if name not in PREPROCESSING:
        raise unknown("preprocessing", name, PREPROCESSING)
    if name == "torchvision" and model_name(config) == "vit_l16":  # The one with another resize.
        return name, dataclasses.replace(PREPROCESSING[name], crop_pct=crop_share(224, 242))
    return name, PREPROCESSING[name]
