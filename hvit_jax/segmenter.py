"""The published results of Segmenter under the methods, and how their tables count GFLOPs.

Liang et al. 2022, arXiv 2210.01035: Segmenter (Strudel et al. 2021) with ViT-L/16 and a mask
transformer on ADE20K, Cityscapes and Pascal Context. Their counter hooks modules, so it sees other
things than that of the classification tables: no biases, no product of bare matrices, no residual.
`hvit_jax.costs` counts everything.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

from hvit_jax.config import Decoder, ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.models.reducer import Layer, Reducer
from hvit_jax.reducers import ACT, EViT, Hourglass, ToMeDense, make_reducer

# Classes, blocks of the decoder, and side of a window in pixels.
_DATA_SETS = {"ade20k": (150, 2, 640), "cityscapes": (19, 1, 768), "pascal_context": (60, 2, 480)}


@functools.cache
def segmenter_rows() -> tuple[dict[str, Any], ...]:
    """Read the published rows.

    A row has `dataset`, `method`, `args`, `resolution`, `restore` where a method reduces, and under
    `published` the `gflops` of one window, `fps`, `throughput` and `miou` in per cent. Printed
    GFLOPs of some rows of EViT leave out the fused token (`gflops_fuse_token`) or the decoder
    (`gflops_note`).
    """
    text = importlib.resources.files("hvit_jax").joinpath("published_dense.json").read_text("utf-8")
    return tuple(row for row in json.loads(text)["rows"] if row["task"] == "segmentation")


def segmenter_config(dataset: str) -> ViTConfig:
    """Give the published Segmenter-L/16 of a data set, at its windows' size."""
    classes, blocks, side = _DATA_SETS[dataset]
    return dataclasses.replace(
        ViTConfig.vit_l16(),
        resolution=side,
        num_classes=0,
        position_resizing="bicubic",
        decoder=Decoder("mask", classes, depth=blocks, heads=16),
    )


def segmenter_method(row: dict[str, Any]) -> Reducer:
    """Make the method of a published row; ACT gets the budget that its GFLOPs imply."""
    reducer = make_reducer(row["method"], **row["args"])
    if isinstance(reducer, ACT):
        # At least 2: on Cityscapes 16 hashes found a single cluster.
        return reducer.with_budgets(max(2, round(row["mean_clusters_implied"])))
    return reducer


def find_segmenter_row(config: ViTConfig, reducer: Reducer, dataset: str) -> dict[str, Any] | None:
    """Find the published row of a model and method on a data set; None if there is none.

    Args:
        config: the model's sizes.
        reducer: the method; every option counts, as in `hvit_jax.published.find_published`.
        dataset: the data set.
    """

    def shape(config: ViTConfig) -> tuple[Any, ...]:
        decoder = config.decoder
        assert decoder is not None
        sizes = (config.image_shape, config.patch_size, config.depth, config.width)
        return *sizes, decoder.kind, decoder.outputs, decoder.depth

    if dataset not in _DATA_SETS or shape(config) != shape(segmenter_config(dataset)):
        return None
    options = reducer.resolve(config).options()
    for row in segmenter_rows():
        if (row["dataset"], row["method"]) == (dataset, reducer.name):
            if segmenter_method(row).resolve(config).options() == options:
                return row
    return None


def row_gflops(row: dict[str, Any]) -> float:
    """Count a published row's GFLOPs, with what its printed figure leaves out."""
    config, reducer = segmenter_config(row["dataset"]), segmenter_method(row)
    if not row.get("gflops_fuse_token", True):
        reducer = dataclasses.replace(reducer, fuse_token=False)
    return table_gflops(config, reducer, decoder="gflops_note" not in row)


def table_gflops(config: ViTConfig, reducer: Reducer, *, decoder: bool = True) -> float:
    """Count one window as the published tables do, in billions of multiply-adds.

    Args:
        config: the sizes of a Segmenter.
        reducer: the method: dense, hourglass, evit, tome_dense or act, of which the tables have
            rows; act counts its budgets as clusters.
        decoder: whether the decoder counts, which three printed rows of EViT leave out.

    Raises:
        InputError: for another model or method.
    """
    if config.decoder is None or config.decoder.kind != "mask":
        raise InputError("the Segmenter tables count models with a mask transformer")
    reducer = reducer.resolve(config)
    layers = reducer.schedule(config)
    patches, width = config.num_patches, config.width
    total = patches * width * (3 * config.patch_size**2 + 1)
    total += sum(_block(config, reducer, layer) for layer in layers)
    total += _around(config, reducer, layers)
    last = layers[-1].tokens_out
    read = last - config.prefix_tokens if isinstance(reducer, Hourglass) else patches
    total += 2 * last * width + (_decoder(config, read) if decoder else 0)
    return total / 1e9


def _attention(config: ViTConfig, tokens: int, queries: int) -> int:
    width = config.width
    projections = 4 * tokens * width**2 + tokens * width
    return projections + queries * (2 * tokens * width + 2 * config.heads * tokens)


def _mlp(config: ViTConfig, tokens: int) -> int:
    return 8 * tokens * config.width**2 + 8 * tokens * config.width


def _block(config: ViTConfig, reducer: Reducer, layer: Layer) -> int:
    """Count a block, with its two norms."""
    before, after = layer.tokens_in, layer.tokens_out
    queries = before
    if isinstance(reducer, Hourglass):  # It clusters before the block, and puts back behind it.
        before = queries = after = min(before, after)
    elif isinstance(reducer, ToMeDense):
        before, after = (count - getattr(layer, "merged", 0) for count in (before, after))
        queries = before
    elif isinstance(reducer, ACT):
        queries = getattr(layer, "clusters", before)
    elif not isinstance(reducer, EViT) and reducer.name != "dense":
        raise InputError(f"the Segmenter tables have no rows of {reducer.name}")
    norms = 2 * config.width * (layer.tokens_in + layer.tokens_out)
    if isinstance(reducer, Hourglass):
        norms = 4 * config.width * before
    return norms + _attention(config, before, queries) + _mlp(config, after)


def _around(config: ViTConfig, reducer: Reducer, layers: tuple[Layer, ...]) -> int:
    """Count what a method does beside its blocks."""
    patches, width = config.num_patches, config.width
    if isinstance(reducer, Hourglass):
        centroids = layers[-1].tokens_out - config.prefix_tokens
        near = min(reducer.cluster_window**2, centroids)
        neighbors = reducer.reconstruct_neighbors
        neighbors = neighbors if 0 < neighbors < centroids else centroids
        update = (2 * width + 3) * patches * near + (patches + 1) * centroids * width
        clustering = patches * width + 2 * (patches + centroids) + reducer.cluster_iters * update
        return clustering + (patches + centroids) * width + (3 + width) * patches * neighbors
    total = 0
    if isinstance(reducer, EViT):
        for layer in layers:
            entering = layer.tokens_in - config.prefix_tokens
            kept = layer.tokens_out - config.prefix_tokens - reducer.fuse_token
            dropped = entering - kept
            if layer.tokens_out < layer.tokens_in:
                total += (2 * dropped + kept) * width + dropped * kept * (width + 1) + 3 * dropped
    return total


def _decoder(config: ViTConfig, patches: int) -> int:
    """Count the mask transformer on some patch tokens."""
    assert config.decoder is not None
    width, classes = config.width, config.decoder.outputs
    tokens = patches + classes
    block = 12 * tokens * (width + width**2)
    inside = patches * width**2 + config.decoder.depth * block
    return inside + 2 * tokens * width + 2 * patches * classes
