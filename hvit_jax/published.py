"""The published results, and how a configuration is named and found among them."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from hvit_jax.architectures import model_name
from hvit_jax.config import ViTConfig
from hvit_jax.ops.flops import TABLE_CLASSES
from hvit_jax.reducers import Reducer, make_reducer


@functools.cache
def published_rows() -> tuple[dict[str, Any], ...]:
    """Read the published results.

    Liang et al. 2022, arXiv 2210.01035: ImageNet-1k, NVIDIA V100, float32. A row has `method`,
    `model`, `args`, `resolution` as [height, width], and under `published` the `gflops` of one
    image, `fps` at batch 1, `throughput` in images per second, and `top1` in per cent.
    """
    text = importlib.resources.files("hvit_jax").joinpath("published.json").read_text("utf-8")
    return tuple(json.loads(text)["rows"])


def describe_configuration(config: ViTConfig, reducer: Reducer) -> dict[str, Any]:
    """Name a configuration in the form that result files and published rows have.

    Args:
        config: the model's sizes.
        reducer: the method, resolved for them.

    Returns:
        Method, model, arguments, and the resolution as [height, width].
    """
    decoder = "" if config.decoder is None else f" + {config.decoder.kind}"
    return {
        "method": reducer.name,
        "model": model_name(config) + decoder,
        "args": reducer.options(),
        "resolution": list(config.image_shape),
    }


def find_published(config: ViTConfig, reducer: Reducer) -> dict[str, Any] | None:
    """Find the published row of a configuration.

    Args:
        config: the model's sizes.
        reducer: the method. Every option counts: those that a row does not name must have their
            defaults, and defaults that depend on the model are filled in before comparing.

    Returns:
        The row, or None if this configuration was not published.
    """
    if config.num_classes != TABLE_CLASSES:
        return None
    options = reducer.resolve(config).options()
    for row in published_rows():
        here = (row["method"], row["model"], tuple(row["resolution"]))
        if here != (reducer.name, model_name(config), config.image_shape):
            continue
        if make_reducer(row["method"], **row["args"]).resolve(config).options() == options:
            return row
    return None
