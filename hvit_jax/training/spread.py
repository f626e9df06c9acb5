"""The gradient of a batch that devices share, with whole parameters or a share on each device.

A share of a parameter is made whole where it is needed, a block's within the block, and its
gradient is summed into shares again: ZeRO-3 (Rajbhandari et al. 2020), also known as FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from hvit_jax.distributed.placement import AXIS, Placement
from hvit_jax.models.parameters import Tree

Gradients = Callable[..., tuple[Tree, dict[str, Any]]]


def spread(gradients: Gradients, placement: Placement, trained: Tree, frozen: Tree) -> Gradients:
    """Make a function of one device's arrays one of all devices' arrays.

    Every device has equally many rows, so the mean over a batch is the mean of the devices' means.

    Args:
        gradients: of trained and frozen parameters, pictures and labels, in shares; it makes them
            whole with `whole_parameters` and `whole_block`.
        placement: the devices.
        trained: parameters to differentiate by, for their shapes.
        frozen: the other parameters, for theirs.
    """
    specs = jax.tree.map(lambda leaf: placement.sharding(leaf.shape).spec, (trained, frozen))
    rows = PartitionSpec(AXIS)

    def mean(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
        # Making a share whole has, backwards, summed its gradient already.
        if axis_of(spec) is not None:
            return gradient / placement.devices
        return jax.lax.pmean(gradient, AXIS)

    def of_one_device(*arguments: Any) -> tuple[Tree, dict[str, Any]]:
        found, metrics = gradients(*arguments)
        return jax.tree.map(mean, found, specs[0]), jax.lax.pmean(metrics, AXIS)

    return jax.shard_map(
        of_one_device,
        mesh=placement.mesh,
        in_specs=(*specs, rows, rows),
        out_specs=(specs[0], PartitionSpec()),
        check_vma=False,
    )


def axis_of(spec: PartitionSpec) -> int | None:
    """Tell along which axis an array is shared, if it is."""
    return spec.index(AXIS) if AXIS in spec else None


def whole_parameters(parameters: Tree, specs: Tree) -> Tree:
    """Make shares of parameters whole, except those that a block makes whole itself.

    Args:
        parameters: one device's.
        specs: how each is shared.
    """

    def whole(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        axis = axis_of(spec)
        return leaf if axis is None else jax.lax.all_gather(leaf, AXIS, axis=axis, tiled=True)

    def whole_across(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        # Blocks are stacked along axis 0: what is cut across the stack cannot wait for a block.
        return leaf if axis_of(spec) else whole(leaf, spec)

    return {
        name: jax.tree.map(whole_across if name == "blocks" else whole, tree, specs[name])
        for name, tree in parameters.items()
    }


def whole_block(specs: Tree) -> Callable[[Any], Any]:
    """Give a function that makes one block's shares whole.

    Args:
        specs: how the stacked parameters of all blocks are shared, in the order of a block's.
    """
    axes = [axis_of(spec) for spec in jax.tree.leaves(specs)]

    def whole(block: Any) -> Any:
        leaves, structure = jax.tree.flatten(block)
        return structure.unflatten(
            jax.lax.all_gather(leaf, AXIS, axis=axis - 1, tiled=True) if axis else leaf
            for leaf, axis in zip(leaves, axes, strict=True)
        )

    return whole
