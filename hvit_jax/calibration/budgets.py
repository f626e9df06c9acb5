"""Budgets of a method: measured and proposed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from hvit_jax.config import ViTConfig
from hvit_jax.data.loader import Batch
from hvit_jax.data.preprocess import normalize
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.vit import ViT
from hvit_jax.pictures import Preprocessing
from hvit_jax.reducers import Budgeted, as_budgeted

# Matrix products on GPUs work in tiles of 8 rows and more.
MULTIPLE = 8


@dataclass(frozen=True)
class BlockCounts:
    """What one block needed for each picture."""

    block: int
    counted: str  # Such as "tokens".
    needed: Int[np.ndarray, "pictures S"]  # One column, or one a head.

    def at_percentile(self, percentile: float) -> int:
        """Find the count that suffices for this share of the pictures, in all their columns."""
        most = self.needed.max(-1)
        return int(np.percentile(most, percentile, method="inverted_cdf"))

    def summary(self, percentile: float) -> dict[str, Any]:
        """Describe the counts as JSON can hold it."""
        return {
            "block": self.block,
            "counted": self.counted,
            "mean": float(self.needed.mean()),
            "median": float(np.median(self.needed)),
            "percentile": self.at_percentile(percentile),
            "max": int(self.needed.max()),
        }


def measure(
    model: ViT,
    batches: Iterable[Batch],
    *,
    batch_size: int,
    placement: Placement,
    preprocessing: Preprocessing = Preprocessing(),
) -> list[BlockCounts]:
    """Count what every block of a method needs whose budgets are not given; padding is left out.

    Args:
        model: a model under the method.
        batches: pictures that have been resized and cut.
        batch_size: rows of every batch.
        placement: the devices that share a batch.
        preprocessing: the checkpoint's, whose mean and deviation normalise the pictures.

    Raises:
        InputError: if a picture cannot be read.
    """
    with_weights, weights = part_weights(model)
    reducer = as_budgeted(model.reducer)
    blocks = reducer.budget_blocks(model.config)

    def count(weights, pixels):
        images = normalize(pixels, preprocessing.mean, preprocessing.std)
        states = with_weights(weights).features(images).states
        return [reducer.counts(states[block]) for block in blocks]

    pixels = jax.ShapeDtypeStruct((batch_size, *model.config.image_shape, 3), np.uint8)
    weights = placement.replicate(weights)
    compiled = placement.compile(count, arrays=1).lower(weights, pixels).compile()
    collected = []
    for batch in batches:
        for problem in batch.problems.values():
            raise InputError(problem)
        counts = jax.device_get(compiled(weights, placement.shard_batch(batch.pixels)))
        collected.append(jax.tree.map(lambda leaf, rows=batch.valid: leaf[rows], counts))
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *collected)
    return [
        BlockCounts(block, name, needed)
        for block, counts in zip(blocks, joined, strict=True)
        for name, needed in counts.items()
    ]


def propose(
    reducer: Budgeted,
    config: ViTConfig,
    counts: Sequence[BlockCounts],
    *,
    percentile: float,
    common: bool = False,
) -> Budgeted:
    """Give a method, resolved, the budgets that suffice for a share of the pictures.

    A block's budget is the count at the percentile, which 100 makes the maximum, rounded up to a
    multiple of 8 and never more than all tokens. With `common` all blocks get the largest budget:
    blocks that are alike compile as one.

    Raises:
        InputError: for a percentile out of range.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"the percentile must be above 0 and at most 100, got {percentile:g}")
    resolved, needed = reducer.resolve(config), {}
    for entry in counts:
        count = -(-entry.at_percentile(percentile) // MULTIPLE) * MULTIPLE
        needed[entry.block] = max(count, needed.get(entry.block, 0))
    blocks = resolved.budget_blocks(config)
    budgets = [min(needed[block], config.num_tokens) for block in blocks]
    chosen = (max(budgets),) * len(budgets) if common else tuple(budgets)
    return resolved.with_budgets(chosen).resolve(config)
