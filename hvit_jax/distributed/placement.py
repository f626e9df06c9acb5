"""Data parallelism: each batch is sharded over the devices, parameters are replicated or sharded.

Where arrays lie is decided here alone. A step is written for one device, and every device runs it
on its own rows: left to XLA's partitioner, a loop over images and heads would run them all on each
device. The devices may belong to several processes; each then has the rows of its own devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hvit_jax.errors import InputError
from hvit_jax.ops.platform import compiler_options

AXIS = "data"


@dataclass(frozen=True)
class Placement:
    """Where a run's arrays lie.

    Attributes:
        mesh: the devices, along one axis `data`, those of a process side by side.
        shard: whether a state is sharded as well, as far as its shapes allow.
    """

    mesh: Mesh
    shard: bool = False

    @property
    def devices(self) -> int:
        """Number of devices, of all processes together."""
        return self.mesh.size

    @property
    def processes(self) -> int:
        """Number of processes that they belong to."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device: parameters and all else in the state."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The first axis divided among the devices: pictures and labels."""
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Say where an array of a state lies: divided along its largest axis that divides."""
        divides = [axis for axis, size in enumerate(shape) if size and size % self.devices == 0]
        if not self.shard or not divides:
            return self.replicated
        longest = max(divides, key=lambda axis: shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * longest, AXIS))

    def replicate(self, tree: Any) -> Any:
        """Put a tree of arrays, which every process has, on every device."""
        return self._put(tree, lambda shape: self.replicated)

    def shard_state(self, state: Any) -> Any:
        """Put a tree of arrays, which every process has, where `sharding` says."""
        return self._put(state, self.sharding)

    def divide(self, array: np.ndarray, *, axis: int) -> jax.Array:
        """Divide an array, which every process has, along an axis that divides by the devices."""
        along = NamedSharding(self.mesh, PartitionSpec(*(None,) * axis, AXIS))
        return self._put(array, lambda shape: along)

    def gather(self, tree: Any) -> Any:
        """Give every process all of a tree's arrays, as NumPy arrays; all processes call this."""
        replicate = jax.jit(lambda tree: tree, out_shardings=self.replicated)
        return jax.device_get(tree if self.devices == 1 else replicate(tree))

    def _put(self, tree: Any, sharding: Callable[[tuple[int, ...]], NamedSharding]) -> Any:
        if self.processes == 1:
            return jax.device_put(tree, jax.tree.map(lambda leaf: sharding(np.shape(leaf)), tree))

        def put(leaf: Any) -> jax.Array:  # `device_put` would compare all copies first.
            values = np.asarray(leaf)
            shape = values.shape
            return jax.make_array_from_callback(shape, sharding(shape), values.__getitem__)

        return jax.tree.map(put, tree)

    def shard_batch(self, array: np.ndarray) -> jax.Array:
        """Divide a batch among the devices, of which this process has the rows (B, ...)."""
        return jax.make_array_from_process_local_data(self.batch_sharding, array)

    def round_up(self, batch_size: int) -> int:
        """Give the smallest batch of at least this size that divides by the number of devices."""
        return -(-batch_size // self.devices) * self.devices

    def compile(self, function: Callable[..., Any], *, arrays: int = 2) -> jax.stages.Wrapped:
        """Compile a function whose results are rows, one for each picture; all devices get them.

        Args:
            function: of a tree, which every device has all of, and its rows of some arrays, such as
                pictures and labels.
            arrays: how many these are.
        """
        rows = PartitionSpec(AXIS)
        specs = (PartitionSpec(), *(rows,) * arrays)
        on_rows = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=rows, check_vma=False
        )
        return jax.jit(on_rows, out_shardings=self.replicated, compiler_options=compiler_options())


def place(devices: Sequence[Any] | None = None, *, shard: bool = False) -> Placement:
    """Use all devices of all processes, or the given ones; each process needs as many."""
    found = sorted(devices or jax.devices(), key=lambda each: (each.process_index, each.id))
    owners = [device.process_index for device in found]
    counts = {owners.count(process) for process in set(owners)}
    if len(counts) > 1:
        raise InputError(
            f"all processes need the same number of devices; there are {min(counts)} to "
            f"{max(counts)}"
        )
    return Placement(Mesh(np.array(found), (AXIS,)), shard)
