"""Making models: `load` a checkpoint, or `create` one with random weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
from jax.typing import DTypeLike

from hvit_jax.architectures import named_config
from hvit_jax.checkpoint import fitted_parameters, read_description
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.distributed.placement import place
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.models.vit import ViT
from hvit_jax.reducers import Reducer, make_reducer


def load(
    checkpoint_dir: str | Path,
    method: str | Reducer = "dense",
    *,
    resolution: int | tuple[int, int] | None = None,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike | None = None,
    attention: str = "auto",
    gelu: str = "auto",
    unroll: bool = False,
    devices: Sequence[jax.Device] | None = None,
    restore: str | None = None,
    **method_args: Any,
) -> ViT:
    """Load a converted or trained checkpoint under a reduction method.

    Args:
        checkpoint_dir: a folder written by `hvit convert` or `hvit train`.
        method: "dense", "hourglass", ... or a built `Reducer`. It is dense by default, whatever the
            checkpoint was trained with; commands use what it was trained with.
        resolution: image size in pixels, one number or (height, width); position embeddings are
            resized. Default: the checkpoint's own.
        dtype: what blocks are computed in, "float32", "bfloat16" or "float64", or the
            type itself, such as `jnp.bfloat16`. "float8": linear layers in e4m3, all else in
            bfloat16; for NVIDIA's GPUs since Ada and Hopper, and slower on a CPU.
        param_dtype: what the blocks' weights are stored in; default: `dtype`.
        attention: "auto", "hopper", "cudnn" or "xla"; see `hvit_jax.ops.attention`.
        gelu: "auto", "exact" or "tanh"; auto is tanh on a GPU in 16 bits.
        unroll: compile every block on its own instead of scanning equal ones.
        devices: for a model that one device is too small for: such as `jax.devices()`, which read a
            part of the blocks' weights each. They gather a block's when it runs, and all compute
            the same. None: all weights lie on the default device.
        restore: where a method's tokens become the full grid again, for models that make maps:
            "masks", "tokens" or "block"; see `hvit_jax.config.Decoder`. Default: the checkpoint's
            own, or the first that the method can do.
        **method_args: the method's options, such as `num_clusters=256`.

    Returns:
        The model; `model(images)` gives logits, `hvit_jax.jit_model(model)` a compiled function.

    Raises:
        InputError: (a ValueError) for anything wrong with the checkpoint or the options.
    """
    reducer = make_reducer(method, **method_args)
    description = read_description(checkpoint_dir).at(resolution)
    config = description.config
    if restore is not None:
        if config.decoder is None:
            raise InputError(f"restore={restore!r} is for models with a decoder")
        decoder = dataclasses.replace(config.decoder, restore=restore)
        config = dataclasses.replace(config, decoder=decoder)
    # Compute takes types, too, and names them.
    compute = Compute(cast(str, dtype), cast(str, param_dtype), attention, gelu, unroll)
    reducer.resolve(config)
    placement = gather = None
    if devices is not None:
        placement = place(devices, shard=True)
        gather = functools.partial(jax.lax.with_sharding_constraint, shardings=placement.replicated)
    parameters = fitted_parameters(checkpoint_dir, config, placement)
    model = build_model(config, reducer, parameters, compute, gather_weights=gather)
    model.preprocessing, model.windows = description.preprocessing, description.windows
    return model


def create(
    config_or_name: ViTConfig | str,
    method: str | Reducer = "dense",
    *,
    seed: int = 0,
    resolution: int | tuple[int, int] | None = None,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike | None = None,
    attention: str = "auto",
    gelu: str = "auto",
    unroll: bool = False,
    **method_args: Any,
) -> ViT:
    """Create a model with random weights.

    Args:
        config_or_name: a configuration, or a model's name, such as "vit_b16" (SWAG's) or
            "vit_base_patch14_dinov2" (timm's); see `hvit_jax.architectures`.
        method: as for `load`.
        seed: of the weights; the same seed gives the same weights under every method.
        resolution: as for `load`; default: the configuration's own.
        dtype: as for `load`.
        param_dtype: as for `load`.
        attention: as for `load`.
        gelu: as for `load`.
        unroll: as for `load`.
        **method_args: as for `load`.

    Raises:
        InputError: (a ValueError) for unknown names or options that do not fit.
    """
    named = isinstance(config_or_name, str)
    if not named and not isinstance(config_or_name, ViTConfig):
        raise InputError(f"expected a ViTConfig or a model's name, got {config_or_name!r}")
    config = named_config(config_or_name) if named else config_or_name
    config = with_resolution(config, resolution)
    reducer = make_reducer(method, **method_args).resolve(config)
    # Compute takes types, too, and names them.
    compute = Compute(cast(str, dtype), cast(str, param_dtype), attention, gelu, unroll)
    return build_model(config, reducer, init_parameters(config, seed), compute)


def with_resolution(config: ViTConfig, resolution: int | tuple[int, int] | None) -> ViTConfig:
    """Replace a configuration's resolution, unless it is None."""
    return config if resolution is None else dataclasses.replace(config, resolution=resolution)
