"""Run kernels of Pallas (Mosaic GPU) on a CPU, by the interpreter that JAX has from 0.11 on.

It runs every warpgroup in a thread, and knows shared memory, barriers and the copy engine. What our
kernels do and it does not know is added here. Instructions that are scheduled wrongly, layouts of
shared memory and registers show on a card only.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 8


def obstacle() -> str | None:
    """Tell why kernels cannot be interpreted here, or None."""
    if jax.__version_info__ < (0, 11):
        return f"JAX interprets kernels for a GPU from 0.11 on, this is {jax.__version__}"
    # XLA starts so many threads, else one a core: those that wait at a barrier would take them all.
    if int(os.environ.get("PJRT_NPROC", 0)) < _THREADS:
        return f"JAX interprets kernels for a GPU where PJRT_NPROC={_THREADS}: `nox -s kernels`"
    return None


@contextlib.contextmanager
def interpreted():
    """Interpret all kernels that are called inside."""
    from jax._src import effects
    from jax._src.pallas.mosaic_gpu import core
    from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret, params, shared_memory

    # A program may hold products.
    for kinds in (effects.lowerable_effects, effects.control_flow_allowed_effects):
        kinds.add_type(core._WGMMAPipelineEffect)
    product, barrier = plgpu.wgmma, shared_memory.Barrier
    find, free = jaxpr_interpret.resolve_ref, barrier.deallocate

    def wgmma(sums, x, y):
        if isinstance(sums, _Sums):
            sums.value += jnp.dot(x, y[...], preferred_element_type=sums.value.dtype)
        else:
            product(sums, x, y)

    def resolve_ref(aval, keys, transforms):
        """Take the first of a union's buffers for all its views, which are of the same shape."""
        _, transforms = find(aval, keys, transforms)
        return (keys[0] if isinstance(aval, core.AbstractRefUnion) else keys), transforms

    def deallocate(self):
        """Let nobody wait for the last phase: that blocks are used matters to the next ones."""
        seen = self.last_observed_phase_by_thread
        if self.ref_count == 1:
            seen.update({thread: self.phase for thread in seen if seen[thread] == self.phase - 1})
        free(self)

    with (
        mock.patch.object(plgpu, "wgmma", wgmma),
        mock.patch.object(pl, "run_state", _run_state),
        mock.patch.object(jaxpr_interpret, "resolve_ref", resolve_ref),
        mock.patch.object(barrier, "deallocate", deallocate),
        params.force_gpu_interpret_mode(params.InterpretGPUParams()),
    ):
        yield


class _Sums:
    """An accumulator of products that starts from a value."""

    def __init__(self, value):
        self.value = value


def _run_state(body):
    def run(starts):
        sums = tuple(_Sums(start._init) for start in starts)
        body(sums)
        return tuple(each.value for each in sums)

    return run
