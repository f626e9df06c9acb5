"""The kernels of `hopper`, in Pallas (Mosaic GPU): attention, and the sums of its columns.

All are jitted, so that a program writes a kernel once for all blocks of one size.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from hvit_jax.ops.arrays import pad_end
from hvit_jax.ops.attention.heads import Heads
from hvit_jax.ops.attention.hopper_blocks import (
    ACC,
    BIAS,
    KEYS,
    LOG2_E,
    MASKED,
    ROWS,
    Buffer,
    Plan,
    Rows,
    Stream,
    Weights,
    add_values,
    arrived,
    fetched_rows,
    launch,
    loop,
    no_sums,
    number_a_row,
    numbers_of_rows,
    shared_numbers,
    slot_of,
    split,
    whole_blocks,
    without_spare,
    write_rows,
)
from hvit_jax.ops.float8 import FLOAT8, LARGEST
from hvit_jax.ops.precision import rounded

# Channels of a bias that are not zero.
_PARTS = 3


@functools.partial(jax.jit, static_argnums=4)
def attend(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None,
    keys: int,
    factor: Float[Array, " C"] | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend to the first keys; see `hvit_jax.ops.attention.hopper.attend`. It has no gradient.

    With a factor the result is multiplied by it, and rounded to e4m3.
    """
    return _attend(q, k, v, key_bias, keys, logs=False, factor=factor)[0]


@jax.jit
def attend_weighted(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    weights: Float[Array, "B H rows columns"],
) -> Float[Array, "B Nq H D"]:
    """Attend with every pair's `exp(score)` multiplied by a weight of its own. It has no gradient.

    Args:
        q: queries.
        k: keys.
        v: values.
        weights: in the dtype of `q`; 0 for pairs that are none. What is not such a pair is filled
            up with zeros: columns to `Plan.padded`, and rows to a multiple of 8.

    Returns:
        Attended values; NaN for a query whose weights are all 0.
    """
    weights = weights.reshape(-1, *weights.shape[2:])
    return _attend(q, k, v, None, k.shape[1], logs=False, weights=weights)[0]


@jax.jit
def attend_and_score(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    v: Heads | Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None,
) -> tuple[Float[Array, "B Nq H D"], Float[Array, "B Nk"]]:
    """Attend, and average each key's weights; see `hvit_jax.ops.attention.attend_and_score`.

    A second kernel turns the roles round: a key's weights are exp(score - log of the query's sum),
    so queries are its keys, and minus these logarithms their bias.
    """
    out, logs = _attend(q, k, v, key_bias, k.shape[1], logs=True)
    sums = _column_sums(q, k, logs[..., : q.shape[1]])
    if key_bias is not None:
        # A key without weight has no part in the logarithms, so that its sum may be infinite.
        factors = jnp.exp(key_bias.astype(jnp.float32))
        sums = jnp.where(factors > 0, sums * factors, 0.0)
    return out, sums.mean(1) / q.shape[1]


def _attend(
    q, k, v, key_bias, keys: int, *, logs: bool, weights=None, factor=None
) -> tuple[Array, ...]:
    q, k, v = (Heads.of(x) for x in (q, k, v))
    plan = Plan.of(keys, q.shape[3])
    arrays = [x.whole for x in (q, k, v)]
    if key_bias is not None:
        arrays.append(bias_channels(plan, key_bias[..., :keys], q.dtype))
    if weights is not None:
        arrays.append(weights)
    if factor is not None:
        arrays.append(factor.reshape(q.shape[2:]))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype if factor is None else FLOAT8)
    results = [out, numbers_of_rows(out)][: 1 + logs]

    def hopper_attention(q_ref, k_ref, v_ref, *refs):
        bias_ref, refs = (None, refs) if key_bias is None else (refs[0], refs[1:])
        weights_ref, refs = (None, refs) if weights is None else (refs[0], refs[1:])
        factor_ref, refs = (None, refs) if factor is None else (refs[0], refs[1:])
        sources = (q_ref, q.first), (k_ref, k.first), (v_ref, v.first)
        extra = bias_ref, weights_ref, factor_ref
        _run(plan, *sources, *extra, refs[0], refs[1] if logs else None)

    return tuple(launch(plan, hopper_attention, out, results)(*arrays))


def bias_channels(plan: Plan, bias: Float[Array, "B h N"], dtype: Any) -> Float[Array, "B h N C"]:
    """Write a bias of scores as channels of the keys that meet ones of the queries.

    Three numbers of 16 bits add up to one of 32. So the matrix instructions add the bias, which
    would be an instruction more for every score.
    """
    least = max(MASKED, float(jnp.finfo(dtype).min))
    rest = jnp.clip(bias.astype(jnp.float32) * (LOG2_E / plan.scale), least, -least)
    parts = []
    for _ in range(_PARTS):
        parts.append(rounded(rest, dtype))
        rest = rest - parts[-1]
    return pad_end(jnp.stack(parts, axis=-1).astype(dtype), BIAS - _PARTS, axis=-1)


def _column_sums(
    q: Heads | Float[Array, "B Nq H D"],
    k: Heads | Float[Array, "B Nk H D"],
    logs: Float[Array, "B H Nq"],
) -> Float[Array, "B H Nk"]:
    """Sum each key's weights over the queries, of whose sums there are logarithms in base 2."""
    q, k = Heads.of(q), Heads.of(k)
    plan = Plan.of(q.shape[1], q.shape[3])

    def hopper_column_sums(k_ref, q_ref, bias_ref, out_ref):
        _run_columns(plan, (k_ref, k.first), (q_ref, q.first), bias_ref, out_ref)

    rows = jax.ShapeDtypeStruct(k.shape, k.dtype)
    kernel = launch(plan, hopper_column_sums, rows, [numbers_of_rows(rows)])
    return kernel(k.whole, q.whole, whole_blocks(plan, -logs))[0][..., : k.shape[1]]


def _run(plan: Plan, q, k, v, bias_ref, weights_ref, factor_ref, out_ref, logs_ref) -> None:
    """Run one block of threads: a few rows of queries, and all keys."""
    dtype = q[0].dtype
    logs, eights, biased = shared_numbers(plan.groups, ROWS, logs_ref), None, bias_ref is not None
    if factor_ref is not None:
        eights = Buffer.shape(plan, FLOAT8, plan.groups, ROWS)
    used = plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages)

    def scoped(queries, keys, values, logs, eights, q_here, k_here, v_here, k_used, v_used, pairs):
        keys = Buffer.of(keys)
        bias = (bias_ref, keys.rows[-1]) if biased else None
        key_stream = Stream(k, keys, k_here, k_used, bias)
        value_stream = Stream(v, Buffer.of(values), v_here, v_used)
        weights = None if weights_ref is None else Weights(weights_ref, *pairs)

        def compute():
            rows = fetched_rows(plan, q, Buffer.of(queries), q_here)
            if biased:
                _meet_bias(rows)
            step = _attend_step(plan, rows, key_stream, weights, value_stream, dtype)
            # The highest score, the sum of weights and that of values of no keys.
            carry = number_a_row(-jnp.inf), number_a_row(0.0), no_sums(plan)
            highest, total, sums = loop(plan, step, carry)
            if logs is not None:
                logs[rows.group] = highest + jnp.log(total) * LOG2_E
            sums = (x / lax.broadcast_in_dim(total, x.shape, [0]) for x in sums)
            if factor_ref is not None:
                sums = _to_float8(plan, rows, sums, factor_ref)
                rows = dataclasses.replace(rows, buffer=Buffer.of(eights))
            write_rows(plan, rows, sums, out_ref)
            if logs is not None:
                plgpu.copy_smem_to_gmem(logs.at[rows.group], rows.numbers(logs_ref))
            plgpu.wait_smem_to_gmem(0)

        streams = (key_stream, value_stream)
        streams = streams if weights is None else (key_stream, weights, value_stream)
        split(plan, out_ref.shape[1], compute, *streams)

    here = plgpu.Barrier(num_arrivals=1, num_barriers=plan.stages)
    pl.run_scoped(
        scoped,
        Buffer.shape(plan, dtype, plan.groups, ROWS, bias=biased),
        Buffer.shape(plan, dtype, plan.stages, KEYS, bias=biased),
        Buffer.shape(plan, dtype, plan.stages, KEYS),
        logs,
        eights,
        arrived(plan, plan.groups),
        arrived(plan, plan.stages, bias=biased),
        arrived(plan, plan.stages),
        used,
        used,
        None if weights_ref is None else (Weights.shape(plan, dtype), here, used),
        collective_axes="group",
    )


def _meet_bias(rows: Rows) -> None:
    """Give rows ones for the channels that `bias_channels` makes."""
    tile = rows.buffer.tiles[-1]
    places = plgpu.broadcasted_iota(jnp.int32, (ROWS, BIAS), 1, layout=plgpu.Layout.WGMMA)
    tile[rows.group] = jnp.where(places < _PARTS, 1.0, 0.0).astype(tile.dtype)
    plgpu.commit_smem()


def _to_float8(plan: Plan, rows: Rows, sums, factor_ref):
    """Scale channels and cut off what is too large, as `ops.float8.to_float8` does."""
    for (first, width), x in zip(plan.pieces, sums, strict=True):
        place, layout = (rows.place[-1], pl.ds(first, width)), plgpu.Layout.WGMMA.reduce(0)
        factor = plgpu.load(factor_ref, place, layout=layout, optimized=False)
        x = x * lax.broadcast_in_dim(factor.astype(x.dtype), x.shape, [1])
        yield jnp.clip(x, -LARGEST, LARGEST)


def _run_columns(plan: Plan, k, q, bias_ref, out_ref) -> None:
    """Run one block of threads: sum the weights of a few keys over all queries."""

    def scoped(keys, queries, biases, sums, k_here, q_here, q_used):
        stream = Stream(q, Buffer.of(queries), q_here, q_used, (bias_ref, biases))

        def compute():
            rows = fetched_rows(plan, k, Buffer.of(keys), k_here)

            def step(block, total, *, last: bool = False):
                slot, part = slot_of(plan, block, last)
                plgpu.barrier_wait(stream.here.at[slot])
                # Read while the products run.
                bias = plgpu.layout_cast(biases[slot, part], plgpu.Layout.WGMMA.reduce(0))
                scores = _products(plan, rows, stream, slot, last=last)
                scores = scores * plan.scale + lax.broadcast_in_dim(bias, scores.shape, [1])
                plgpu.barrier_arrive(stream.used.at[slot])
                if last:
                    scores = without_spare(plan, scores, MASKED)
                return total + jnp.exp2(scores).sum(axis=1)

            sums[rows.group] = loop(plan, step, number_a_row(0.0))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums.at[rows.group], rows.numbers(out_ref))
            plgpu.wait_smem_to_gmem(0)

        split(plan, k[0].shape[1], compute, stream)

    pl.run_scoped(
        scoped,
        Buffer.shape(plan, q[0].dtype, plan.groups, ROWS),
        Buffer.shape(plan, q[0].dtype, plan.stages, KEYS),
        shared_numbers(plan.stages, KEYS, bias_ref),
        shared_numbers(plan.groups, ROWS, out_ref),
        arrived(plan, plan.groups),
        arrived(plan, plan.stages, bias=True),
        plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
        collective_axes="group",
    )


def _products(plan: Plan, rows: Rows, keys: Stream, slot, *, last: bool):
    """Multiply rows and a block of keys."""
    length, scored = (plan.last, plan.scored) if last else (KEYS, KEYS)

    def products(scores):
        part = pl.ds(0, scored)
        for row, key in zip(rows.buffer.tiles, keys.buffer.tiles, strict=True):
            turned = plgpu.transpose_ref(key.at[slot, part], (1, 0))
            plgpu.wgmma(scores.at[:, part], row.at[rows.group], turned)
        return scores[...]

    return pl.run_scoped(products, ACC((ROWS, length), jnp.float32))


def _attend_step(
    plan: Plan, rows: Rows, keys: Stream, pairs: Weights | None, values: Stream, dtype
):
    """Make the step of a softmax that grows block by block."""

    def step(block, carry, *, last: bool = False):
        highest, total, sums = carry
        slot, part = slot_of(plan, block, last)
        # Read while the products run.
        factors = None if pairs is None else pairs.load(rows.group, slot, part)
        plgpu.barrier_wait(keys.here.at[slot])
        scores = _products(plan, rows, keys, slot, last=last)
        plgpu.barrier_arrive(keys.used.at[slot])
        if last:
            scores = without_spare(plan, scores, MASKED)
        if factors is not None:
            # A score that does not count must not be the highest, by far, of those that do.
            scores = jnp.where(factors > 0, scores, MASKED)
        higher = jnp.maximum(highest, scores.max(axis=1) * plan.scale)
        shrink = jnp.exp2(highest - higher)
        # In base 2, as the hardware takes exponentials; scaled with the subtraction.
        weights = jnp.exp2(scores * plan.scale - lax.broadcast_in_dim(higher, scores.shape, [0]))
        if factors is not None:
            weights = weights * factors.astype(jnp.float32)
        total = total * shrink + weights.sum(axis=1)
        sums = tuple(x * lax.broadcast_in_dim(shrink, x.shape, [0]) for x in sums)
        weights = weights.astype(dtype)
        # All of this comes before the wait.
        higher, total, sums, weights = lax.optimization_barrier((higher, total, sums, weights))
        plgpu.barrier_wait(values.here.at[slot])
        sums = add_values(sums, weights, values.buffer, slot, part)
        plgpu.barrier_arrive(values.used.at[slot])
        return higher, total, sums

    return step
