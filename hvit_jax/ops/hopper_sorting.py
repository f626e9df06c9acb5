"""Sorting many rows at once, in a kernel of our own for NVIDIA's Hopper GPUs.

In Pallas (Mosaic GPU). A sort of 1,024 numbers has 55 stages. XLA moves every number through shared
memory at each; here a thread holds 64 numbers of a row in registers, and exchanges them 9 times.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, UInt32

from hvit_jax.ops.arrays import pad_end

# A row is cut into segments of so many places. Shared memory holds one number after the other of a
# place, as many as a warpgroup has threads: those of several rows, and of all segments of each.
_PLACES, _LANES = 256, 128
# Warpgroups, and the numbers that a thread holds: together they hold all places.
_GROUPS, _HELD = 4, 64
_MOST = np.uint32(2**32 - 1)


@functools.partial(jax.jit, static_argnums=1)
def sorted_at(numbers: UInt32[Array, "rows N"], places: tuple[int, ...]) -> UInt32[Array, "P rows"]:
    """Find what stands at some places of each row in ascending order.

    Args:
        numbers: at least one row, of up to 32,768 numbers.
        places: from 0 to N - 1.
    """
    rows, given = numbers.shape
    segments = max(1, 2 ** (given - 1).bit_length() // _PLACES)
    at_once = _LANES // segments
    numbers = pad_end(numbers, segments * _PLACES - given, axis=1, constant_values=_MOST)
    numbers = pad_end(numbers, -rows % at_once, axis=0)
    # Where a number starts makes no difference.
    blocks = numbers.reshape(-1, at_once, _PLACES * segments).swapaxes(1, 2)
    blocks = blocks.reshape(-1, _PLACES, _LANES)
    kept = sorted({place % _PLACES for place in places})

    def hopper_sort(x_ref, out_ref):
        _run(segments, kept, x_ref, out_ref)

    run = plgpu.kernel(
        hopper_sort,
        out_type=jax.ShapeDtypeStruct((len(blocks), len(kept), _LANES), jnp.uint32),
        grid=(len(blocks),),
        grid_names=("block",),
        num_threads=_GROUPS,
        thread_name="group",
        # For "Warpgroup" Mosaic takes half a minute to find layouts. It would have a warpgroup
        # wait before and after each number that is written: `_wait` does where others read it.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    # Else JAX_ENABLE_X64 would give some of a kernel's whole numbers 64 bits, and others 32.
    out = jax.enable_x64(False)(run)(blocks).reshape(len(blocks), len(kept), segments, at_once)
    found = [out[:, kept.index(place % _PLACES), place // _PLACES] for place in places]
    return jnp.stack(found).reshape(len(places), -1)[:, :rows]


def _run(segments: int, kept: Sequence[int], x_ref, out_ref) -> None:
    """Sort the rows of one block of threads."""

    def scoped(shared, arrived):
        _Network(segments, shared, arrived).sort(x_ref, kept, out_ref)

    # Room at both ends for what is read beside a place, and not used.
    room = plgpu.SMEM((_PLACES * _LANES + 2 * _LANES,), jnp.uint32)
    pl.run_scoped(scoped, room, plgpu.Barrier(num_arrivals=_GROUPS), collective_axes="group")


class _Network:
    """Batcher's bitonic sort (1968): level after level, it merges sorted halves of 2^level places.

    It puts pairs in order whose places differ in one bit. A warpgroup holds places that follow each
    other to compare by bits 0 to 5, and every fourth place for bits 2 to 7. Bits from 8 on tell the
    segment, and other threads of the same warpgroup hold that.
    """

    def __init__(self, segments: int, shared, arrived):
        self.segments, self.shared, self.arrived = segments, shared, arrived
        self.group = lax.axis_index("group")
        layout = plgpu.Layout.WG_STRIDED((_LANES,), vec_size=1)
        lane = plgpu.broadcasted_iota(jnp.int32, (_LANES,), 0, layout=layout)
        self.segment = lane // (_LANES // segments)

    def sort(self, x_ref, kept: Sequence[int], out_ref) -> None:
        """Sort one block, and write what comes to some places of all segments."""
        block, first = lax.axis_index("block"), self.group * _HELD
        # Segments are merged of which every other one is in descending order.
        held = self._turned([x_ref[block, first + index] for index in range(_HELD)], 0)
        for level in range(1, 7):
            held = _exchange(held, 2**level - 1)
            for bit in reversed(range(level - 1)):
                held = _exchange(held, 2**bit)
        self._store(held, near=True)
        levels = 8 + (self.segments - 1).bit_length()
        for level in range(7, levels + 1):
            for bit in range(level - 1, 8, -1):
                self._store(self._across(bit), near=False)
            held = self._mirrored(level) if level <= 8 else self._across(8)
            for bit in range(min(level - 2, 7), 1, -1):
                held = _exchange(held, 2 ** (bit - 2))
            self._store(held, near=False)
            held = [self._load(first + index) for index in range(_HELD)]
            for bit in (1, 0):
                held = _exchange(held, 2**bit)
            if level >= 8:
                held = self._turned(held, level - 8, level - 7)
            if level < levels:
                self._store(held, near=True)
        for group in range(_GROUPS):

            @pl.when(self.group == group)
            def _(group=group):
                for index, place in enumerate(kept):
                    if place // _HELD == group:
                        out_ref[block, index] = held[place % _HELD]

    def _load(self, place, shift: int = 0):
        """Read a place of all segments, or of those beside them."""
        return self.shared[pl.ds((place + 1) * _LANES + shift, _LANES)]

    def _store(self, held, *, near: bool) -> None:
        """Write places that follow each other, or every fourth, which others may still read."""
        if not near:
            self._wait()
        for index, numbers in enumerate(held):
            place = self.group * _HELD + index if near else index * _GROUPS + self.group
            self.shared[pl.ds((place + 1) * _LANES, _LANES)] = numbers
        self._wait()

    def _wait(self) -> None:
        """Wait until all threads are here, and see what they have written."""
        plgpu.barrier_arrive(self.arrived)
        plgpu.barrier_wait(self.arrived)

    def _turned(self, held, *bits: int):
        """Turn the order round in the segments whose number has a bit: complements are sorted."""
        for bit in bits:
            if 2**bit < self.segments:
                mask = jnp.where(self._has(bit), _MOST, np.uint32(0))
                held = [numbers ^ mask for numbers in held]
        return held

    def _has(self, bit: int):
        return (self.segment >> bit & 1) == 1

    def _mirrored(self, level: int):
        """Compare the first place of each 2^level with the last, and so on towards their middle."""
        held = []
        for index in range(_HELD):
            other = (index ^ (2 ** (level - 2) - 1)) * _GROUPS + _GROUPS - 1 - self.group
            pair = self._load(index * _GROUPS + self.group), self._load(other)
            held.append((jnp.maximum if index >> (level - 3) & 1 else jnp.minimum)(*pair))
        return held

    def _across(self, bit: int):
        """Compare with the segments whose numbers differ in a bit."""
        held, upper = [], self._has(bit - 8)
        shift = _LANES // self.segments * 2 ** (bit - 8)
        for index in range(_HELD):
            place = index * _GROUPS + self.group
            own, before, behind = (self._load(place, by) for by in (0, -shift, shift))
            held.append(jnp.where(upper, jnp.maximum(own, before), jnp.minimum(own, behind)))
        return held


def _exchange(held, flip: int):
    """Put pairs in order whose indices differ in the bits of a number."""
    return [
        (jnp.maximum if index > index ^ flip else jnp.minimum)(x, held[index ^ flip])
        for index, x in enumerate(held)
    ]
