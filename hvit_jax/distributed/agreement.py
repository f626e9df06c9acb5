"""A question that all processes of a run answer alike."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.distributed.placement import Placement

_LATE = 2


class Agreement:
    """Tells every process whether any of them wants something.

    The answer is two questions late, so that asking never waits for a device to be idle. Every
    process asks equally often, and hears the same.
    """

    def __init__(self, placement: Placement):
        """Prepare to ask the processes of a placement."""
        self._placement = placement
        self._rows = placement.devices // placement.processes
        self._any = jax.jit(jnp.any, out_shardings=placement.replicated)
        self._asked: collections.deque[jax.Array] = collections.deque()

    def __call__(self, wanted: bool) -> bool:
        """Say what this process wants, and hear whether any has wanted it."""
        if self._placement.processes == 1:
            return wanted
        flags = self._placement.divide(np.full(self._rows, wanted))
        self._asked.append(self._any(flags))
        return len(self._asked) > _LATE and bool(self._asked.popleft())
