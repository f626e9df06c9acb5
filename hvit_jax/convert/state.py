"""From a state dict to our tree of parameters and back, by the tables in `keys`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from hvit_jax.convert.detect import expected_keys
from hvit_jax.convert.keys import Format
from hvit_jax.models.parameters import Tree, flatten


def to_tree(state: Mapping[str, Float32[np.ndarray, "*shape"]], layout: Format, depth: int) -> Tree:
    """Arrange a state dict as our tree; it must be whole, as `detect` checks.

    Args:
        state: float32 arrays by PyTorch's keys.
        layout: its format.
        depth: its blocks.
    """
    tree: dict[str, Any] = {}
    for entry in layout.entries:
        if entry.stacked:
            keys = [entry.key.format(i=number) for number in range(depth)]
            array = np.stack([entry.layout.to_ours(state[key]) for key in keys])
        elif entry.key in state:
            array = np.ascontiguousarray(entry.layout.to_ours(state[entry.key]))
        else:
            continue
        *folders, leaf = entry.path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = array
    return tree


def to_state(
    parameters: Tree, layout: Format
) -> Iterator[tuple[str, Float32[np.ndarray, "*shape"]]]:
    """Arrange our tree as a state dict, array by array, in the order of PyTorch's own.

    Args:
        parameters: the tree.
        layout: the format wanted.
    """
    leaves = flatten(parameters)
    depth = len(leaves["blocks/ln_1/scale"])
    classes = int("head/kernel" in leaves)
    counts: Counter[str] = Counter()
    for key, entry in expected_keys(layout, {"depth": depth, "K": classes}):
        leaf = leaves[entry.path]
        if entry.stacked:
            leaf = leaf[counts[entry.path]]
            counts[entry.path] += 1
        yield key, entry.layout.to_torch(leaf)
