"""The gradient of a batch that devices share, with a copy or a shard of the parameters on each.

A sharded parameter is gathered where it is needed, a block's within the block, and its gradient is
summed into shards again: ZeRO-3 (Rajbhandari et al. 2020), also known as FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from hvit_jax.distributed.placement import AXIS, Placement
from hvit_jax.models.parameters import Tree


def on_all_devices(
    gradients: Callable[..., Any],
    placement: Placement,
    trained: Tree,
    frozen: Tree,
    teacher: Tree | None,
) -> Callable[..., Any]:
    """Make a function of one device's arrays one of all devices' arrays.

    `gradients` is of trained and frozen parameters, pictures, labels and a teacher's parameters,
    and gathers sharded parameters. Every device has equally many rows, so the mean over a batch is
    that of the devices' means.
    """
    trees = (trained, frozen, teacher)
    specs = jax.tree.map(lambda leaf: placement.sharding(leaf.shape).spec, trees)
    rows = PartitionSpec(AXIS)

    def mean(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        # The backward pass of gathering a shard has summed its gradient already.
        if _axis(spec) is not None:
            return gradient / placement.devices
        return jax.lax.pmean(gradient, AXIS)

    def on_one_device(*arguments: Any) -> Any:
        found, metrics = gradients(*arguments)
        return jax.tree.map(mean, found, specs[0]), jax.lax.pmean(metrics, AXIS)

    return jax.shard_map(
        on_one_device,
        mesh=placement.mesh,
        in_specs=(*specs[:2], rows, rows, specs[2]),
        out_specs=(specs[0], PartitionSpec()),
        check_vma=False,
    )


def gather_parameters(parameters: Tree, specs: Tree) -> Tree:
    """Gather one device's shards of parameters, except those that a block gathers itself."""

    def gather(path: Any, leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        axis = _axis(spec)
        # Blocks are stacked along axis 0: what is cut across the stack cannot wait for a block.
        waits = path[0].key == "blocks" and axis
        return leaf if axis is None or waits else _gather(leaf, axis)

    return jax.tree_util.tree_map_with_path(gather, parameters, specs)


def gather_block(specs: Tree) -> Callable[[Any], Any]:
    """Give a function that gathers one block's shards; `specs` are those of the stacked blocks."""
    axes = [_axis(spec) for spec in jax.tree.leaves(specs)]

    def gather(block: Any) -> Any:
        leaves, structure = jax.tree.flatten(block)
        return structure.unflatten(
            _gather(leaf, axis - 1) if axis else leaf
            for leaf, axis in zip(leaves, axes, strict=True)
        )

    return gather


def _axis(spec: PartitionSpec) -> int | None:
    """Tell along which axis an array is sharded, if it is."""
    return spec.index(AXIS) if AXIS in spec else None


def _gather(leaf: jax.Array, axis: int) -> jax.Array:
    return jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True)
