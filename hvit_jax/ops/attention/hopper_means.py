"""Means of groups of tokens, in a kernel of our own for NVIDIA's Hopper GPUs.

In Pallas (Mosaic GPU), of the parts of the attention kernel: groups stand for queries, tokens for
keys. Attention between codes of groups and members gives the same means, but it writes the codes,
multiplies them and takes exponentials; here a weight is 1 where the numbers are equal, else 0.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from hvit_jax.ops.attention.hopper_blocks import (
    KEYS,
    ROWS,
    Buffer,
    Plan,
    Stream,
    add_values,
    arrived,
    launch,
    loop,
    no_sums,
    number_a_row,
    rows_of_group,
    shared_numbers,
    slot_of,
    split,
    whole_blocks,
    without_spare,
    write_rows,
)


@functools.partial(jax.jit, static_argnums=2)
def average(
    x: Float[Array, "B N H D"], members: Int[Array, "B H N"], count: int
) -> Float[Array, "B K H D"]:
    """Average the vectors of each group, zeros for one without members. It has no gradient.

    Args:
        x: vectors of 16 bits.
        members: the group of every vector.
        count: K, how many groups there are.
    """
    plan = Plan.of(x.shape[1], x.shape[3])
    out = jax.ShapeDtypeStruct((x.shape[0], count, *x.shape[2:]), x.dtype)

    def hopper_means(x_ref, members_ref, out_ref):
        _run(plan, x_ref, members_ref, out_ref)

    # Floats hold them exactly.
    numbers = whole_blocks(plan, members.astype(jnp.float32))
    return launch(plan, hopper_means, out, [out])(x, numbers)[0]


def _run(plan: Plan, x_ref, members_ref, out_ref) -> None:
    """Run one block of threads: a few groups, and all tokens of a head."""

    def scoped(values, members, results, here, used):
        stream = Stream((x_ref, 0), Buffer.of(values), here, used, (members_ref, members))

        def compute():
            rows = rows_of_group(plan, Buffer.of(results))
            step = _step(plan, rows.start, stream, members, out_ref.dtype)
            total, sums = loop(plan, step, (number_a_row(0.0), no_sums(plan)))
            total = jnp.maximum(total, 1.0)
            means = (x / lax.broadcast_in_dim(total, x.shape, [0]) for x in sums)
            write_rows(plan, rows, means, out_ref)
            plgpu.wait_smem_to_gmem(0)

        split(plan, out_ref.shape[1], compute, stream)

    pl.run_scoped(
        scoped,
        Buffer.shape(plan, x_ref.dtype, plan.stages, KEYS),
        shared_numbers(plan.stages, KEYS, members_ref),
        Buffer.shape(plan, x_ref.dtype, plan.groups, ROWS),
        arrived(plan, plan.stages, bias=True),
        plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
        collective_axes="group",
    )


def _step(plan: Plan, start, stream: Stream, members, dtype):
    """Make the step that adds a block of tokens to the groups from number `start` on."""

    def step(block, carry, *, last: bool = False):
        total, sums = carry
        slot, part = slot_of(plan, block, last)
        plgpu.barrier_wait(stream.here.at[slot])
        numbers = plgpu.layout_cast(members[slot, part], plgpu.Layout.WGMMA.reduce(0))
        shape = (ROWS, plan.last if last else KEYS)
        groups = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start
        numbers = lax.broadcast_in_dim(numbers, shape, [1])
        weights = jnp.where(groups.astype(jnp.float32) == numbers, 1.0, 0.0)
        if last:
            weights = without_spare(plan, weights, 0.0)
        total = total + weights.sum(axis=1)
        sums = add_values(sums, weights.astype(dtype), stream.buffer, slot, part)
        plgpu.barrier_arrive(stream.used.at[slot])
        return total, sums

    return step
