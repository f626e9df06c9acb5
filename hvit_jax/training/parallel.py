"""Data parallelism: every device takes a share of each batch and holds all parameters.

Where arrays lie is decided here alone. The step itself is written for one device; XLA divides it,
and adds the sums over devices that the mean of loss and gradients needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hvit_jax.errors import InputError

_AXIS = "data"


@dataclass(frozen=True)
class Placement:
    """Where a run's arrays lie.

    Attributes:
        mesh: the devices, along one axis `data`.
    """

    mesh: Mesh

    @property
    def devices(self) -> int:
        """Number of devices."""
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device: parameters and all else in the state."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def divided(self) -> NamedSharding:
        """A share of the first axis on every device: pictures and labels."""
        return NamedSharding(self.mesh, PartitionSpec(_AXIS))

    def replicate(self, tree: Any) -> Any:
        """Put a tree of arrays on every device."""
        return jax.device_put(tree, self.replicated)

    def divide(self, array: np.ndarray) -> jax.Array:
        """Put a share of a batch on every device.

        Args:
            array: the rows that this process has, of any shape (B, ...).
        """
        return jax.make_array_from_process_local_data(self.divided, array)

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """Compile a function of a replicated tree, pictures and labels.

        Args:
            function: what to run.
            **options: of `jax.jit`.
        """
        shardings = (self.replicated, self.divided, self.divided)
        return jax.jit(function, in_shardings=shardings, **options)


def place(devices: Sequence[Any] | None = None) -> Placement:
    """Use all devices of this process, or the given ones."""
    return Placement(Mesh(np.array(devices or jax.local_devices()), (_AXIS,)))


def check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Check that every device gets as many pictures of a batch as any other.

    Args:
        batch_size: pictures in a step.
        accumulate: parts that a step takes them in.
        devices: devices that share each part.

    Raises:
        InputError: if the batch does not divide.
    """
    parts = accumulate * devices
    if batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        shared = f" and {devices} devices" if devices > 1 else ""
        raise InputError(
            f"--batch-size {batch_size} does not divide by {parts} (--accumulate {accumulate}"
            f"{shared}); the nearest that does: {near}"
        )
