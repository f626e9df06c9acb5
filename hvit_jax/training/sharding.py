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

Gradients = Callable[..., tuple[Tree, dict[str, Any]]]


def on_all_devices(
    gradients: Gradients, placement: Placement, trained: Tree, frozen: Tree
) -> Gradients:
    """Make a function of one device's arrays one of all devices' arrays.

    Every device has equally many rows, so the mean over a batch is the mean of the devices' means.

    Args:
        gradients: of trained and frozen parameters, pictures and labels; it gathers sharded
            parameters with `gather_parameters` and `gather_block`.
        placement: the devices.
        trained: parameters to differentiate by, for their shapes.
        frozen: the other parameters, for theirs.
    """
    specs = jax.tree.map(lambda leaf: placement.sharding(leaf.shape).spec, (trained, frozen))
    rows = PartitionSpec(AXIS)

    def mean(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        # The backward pass of gathering a shard has summed its gradient already.
        if _axis(spec) is not None:
            return gradient / placement.devices
        return jax.lax.pmean(gradient, AXIS)

    def on_one_device(*arguments: Any) -> tuple[Tree, dict[str, Any]]:
        found, metrics = gradients(*arguments)
        return jax.tree.map(mean, found, specs[0]), jax.lax.pmean(metrics, AXIS)

    return jax.shard_map(
        on_one_device,
        mesh=placement.mesh,
        in_specs=(*specs, rows, rows),
        out_specs=(specs[0], PartitionSpec()),
        check_vma=False,
    )


def _axis(spec: PartitionSpec) -> int | None:
    """Tell along which axis an array is sharded, if it is."""
    return spec.index(AXIS) if AXIS in spec else None


def gather_parameters(parameters: Tree, specs: Tree) -> Tree:
    """Gather sharded parameters, except those that a block gathers itself.

    Args:
        parameters: one device's.
        specs: how each is sharded.
    """

    def gather(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        axis = _axis(spec)
        return leaf if axis is None else jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True)

    def gather_across(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        # Blocks are stacked along axis 0: what is cut across the stack cannot wait for a block.
        return leaf if _axis(spec) else gather(leaf, spec)

    return {
        name: jax.tree.map(gather_across if name == "blocks" else gather, tree, specs[name])
        for name, tree in parameters.items()
    }


def gather_block(specs: Tree) -> Callable[[Any], Any]:
    """Give a function that gathers one block's shards.

    Args:
        specs: how the stacked parameters of all blocks are sharded, in the order of a block's.
    """
    axes = [_axis(spec) for spec in jax.tree.leaves(specs)]

    def gather(block: Any) -> Any:
        leaves, structure = jax.tree.flatten(block)
        return structure.unflatten(
            jax.lax.all_gather(leaf, AXIS, axis=axis - 1, tiled=True) if axis else leaf
            for leaf, axis in zip(leaves, axes, strict=True)
        )

    return gather
