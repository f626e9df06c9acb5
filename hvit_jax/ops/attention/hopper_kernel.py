"""The kernel of `hopper`, in Pallas (Mosaic GPU).

A block of threads attends for a few rows of one head: one warpgroup fetches blocks of keys and
values, the others compute. Any number of tokens will do, since the copy engine fills up with zeros
what it reads beyond them and leaves out what it writes there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

# Rows of a warpgroup's matrix instructions; keys of a block, and what the last one is rounded to.
_ROWS, _KEYS, _LAST_KEYS = 64, 128, 64
_STAGES = 2
# Stands for -inf, where -inf - (-inf) would make NaN.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)
# JAX's own kernels take it from here too.
_ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        groups: warpgroups that compute, each 64 rows of queries; one more fetches.
        pieces: where the pieces of a head's channels start, and their widths. The copy engine
            scatters a piece over shared memory as the matrix instructions read it.
        full: blocks of 128 keys.
        rest: keys behind them.
        last: the same rounded up, a block of its own; 0 if there are none.
    """

    groups: int
    pieces: tuple[tuple[int, int], ...]
    full: int
    rest: int
    last: int

    @classmethod
    def of(cls, keys: int, size: int) -> Plan:
        """Cut the work for a number of keys and a head size."""
        pieces, start = [], 0
        for width in (64, 32, 16):
            while size - start >= width:
                pieces.append((start, width))
                start += width
        full, rest = divmod(keys, _KEYS)
        # Three groups hide each other's softmax; wider heads leave registers for two.
        groups = 3 if size <= 64 else 2
        return cls(groups, tuple(pieces), full, rest, -(-rest // _LAST_KEYS) * _LAST_KEYS)

    @property
    def stages(self) -> int:
        """Blocks of keys and values that are under way or in use at a time."""
        return min(_STAGES, self.full + (self.last > 0))

    def length(self, block: int) -> int:
        """Count the keys of a block."""
        return _KEYS if block < self.full else self.last

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that fetches."""
        return (160, 32) if self.groups == 3 else (232, 40)


def attend(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None,
) -> Float[Array, "B Nq H D"]:
    """Attend; see `hvit_jax.ops.attention.hopper.attend`. It has no gradient."""
    batch, rows, heads, size = q.shape
    plan = Plan.of(k.shape[1], size)
    arrays = [q, k, v]
    if key_bias is not None:
        spare = plan.full * _KEYS + plan.last - k.shape[1]
        bias = jnp.maximum(key_bias.astype(jnp.float32) * _LOG2_E, _MASKED)
        padding = ((0, 0), (0, 0), (0, spare))
        arrays.append(jnp.pad(bias, padding, constant_values=_MASKED))

    def hopper_attention(*refs):
        _run(plan, *(refs if key_bias is not None else (*refs[:3], None, refs[3])))

    return plgpu.kernel(
        hopper_attention,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(heads, pl.cdiv(rows, plan.groups * _ROWS), batch),
        grid_names=("head", "tile", "image"),
        num_threads=plan.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays)


@dataclass(frozen=True)
class _Buffer:
    """A head's channels in shared memory, piece by piece, as two views of the same bytes.

    The copy engine takes any number of tokens in rows of a piece; the matrix instructions want
    tiles of eight of these rows, which lie in the same order.
    """

    rows: Sequence[Any]
    tiles: Sequence[Any]

    @staticmethod
    def shape(plan: Plan, dtype: Any, *leading: int) -> list[plgpu.RefUnion]:
        unions = []
        for _, width in plan.pieces:
            swizzle = plgpu.SwizzleTransform(2 * width)
            tiling = plgpu.TilingTransform((8, width))
            views = (swizzle,), (tiling, swizzle)
            unions.append(
                plgpu.RefUnion(
                    *(plgpu.SMEM((*leading, width), dtype, transforms=view) for view in views)
                )
            )
        return unions

    @classmethod
    def of(cls, unions: Sequence[Any]) -> _Buffer:
        return cls([union[0] for union in unions], [union[1] for union in unions])


def _run(plan: Plan, q_ref, k_ref, v_ref, bias_ref, out_ref) -> None:
    """Run one block of threads: a few rows of queries, and all keys."""
    dtype, pieces, stages = q_ref.dtype, len(plan.pieces), plan.stages
    biases = None if bias_ref is None else plgpu.SMEM((stages, _KEYS), jnp.float32)
    arrived = [pieces, pieces + (bias_ref is not None), pieces]
    count = [plan.groups, stages, stages]

    def scoped(queries, keys, values, biases, q_here, k_here, v_here, k_used, v_used):
        inputs = _Buffer.of(keys), _Buffer.of(values), biases, k_here, v_here, k_used, v_used

        @pl.when(lax.axis_index("group") < plan.groups)
        def _():
            plgpu.set_max_registers(plan.registers[0], action="increase")
            _compute(plan, q_ref, out_ref, _Buffer.of(queries), q_here, *inputs)

        @pl.when(lax.axis_index("group") == plan.groups)
        def _():
            plgpu.set_max_registers(plan.registers[1], action="decrease")
            _fetch(plan, k_ref, v_ref, bias_ref, *inputs)

    pl.run_scoped(
        scoped,
        _Buffer.shape(plan, dtype, plan.groups, _ROWS),
        _Buffer.shape(plan, dtype, stages, _KEYS),
        _Buffer.shape(plan, dtype, stages, _KEYS),
        biases,
        *(
            plgpu.Barrier(num_arrivals=a, num_barriers=n)
            for a, n in zip(arrived, count, strict=True)
        ),
        *(plgpu.Barrier(num_arrivals=plan.groups, num_barriers=stages) for _ in range(2)),
        collective_axes="group",
    )


def _fetch(plan, k_ref, v_ref, bias_ref, keys, values, biases, k_here, v_here, k_used, v_used):
    """Copy block after block of keys, their bias and values to shared memory."""
    image, head = lax.axis_index("image"), lax.axis_index("head")

    def copy(block, slot, length: int, *, reuse: bool):
        # A start that is known only when the kernel runs may lie less than a block from the end.
        span, part = pl.ds(jnp.int32(block) * _KEYS, length), pl.ds(0, length)
        if reuse:
            plgpu.barrier_wait(k_used.at[slot])
        _copy_pieces(plan, k_ref, (image, span, head), keys, (slot, part), k_here.at[slot])
        if bias_ref is not None:
            row = bias_ref.at[image, 0 if bias_ref.shape[1] == 1 else head, span]
            plgpu.copy_gmem_to_smem(row, biases.at[slot, part], k_here.at[slot])
        if reuse:
            plgpu.barrier_wait(v_used.at[slot])
        _copy_pieces(plan, v_ref, (image, span, head), values, (slot, part), v_here.at[slot])

    for block in range(plan.stages):
        copy(block, block, plan.length(block), reuse=False)

    @pl.loop(plan.stages, max(plan.full, plan.stages))
    def _(block):
        copy(block, lax.rem(block, jnp.int32(plan.stages)), _KEYS, reuse=True)

    if plan.last and plan.full >= plan.stages:
        copy(plan.full, plan.full % plan.stages, plan.last, reuse=True)


def _copy_pieces(plan, ref, place, buffer: _Buffer, slot, barrier) -> None:
    for (start, width), piece in zip(plan.pieces, buffer.rows, strict=True):
        source = ref.at[(*place, pl.ds(start, width))]
        plgpu.copy_gmem_to_smem(source, piece.at[slot], barrier)


def _compute(
    plan, q_ref, out_ref, queries, q_here, keys, values, biases, k_here, v_here, k_used, v_used
):
    """Attend for one warpgroup's rows, with a softmax that grows block by block."""
    image, head, group = (lax.axis_index(name) for name in ("image", "head", "group"))
    start = (lax.axis_index("tile") * plan.groups + group) * _ROWS
    place, size = (image, pl.ds(start, _ROWS), head), q_ref.shape[-1]
    _copy_pieces(plan, q_ref, place, queries, group, q_here.at[group])
    plgpu.barrier_wait(q_here.at[group])

    def step(block, carry, *, last: bool = False):
        highest, total, sums = carry
        length = plan.last if last else _KEYS
        slot = plan.full % plan.stages if last else lax.rem(block, jnp.int32(plan.stages))
        part = pl.ds(0, length)
        plgpu.barrier_wait(k_here.at[slot])
        bias = None
        if biases is not None:  # Read while the products run.
            bias = plgpu.layout_cast(biases[slot, part], plgpu.Layout.WGMMA.reduce(0))

        def products(scores):
            for query, key in zip(queries.tiles, keys.tiles, strict=True):
                turned = plgpu.transpose_ref(key.at[slot, part], (1, 0))
                plgpu.wgmma(scores, query.at[group], turned)
            return scores[...]

        # In base 2, in which the hardware takes exponentials.
        scores = pl.run_scoped(products, _ACC((_ROWS, length), jnp.float32))
        scale = _LOG2_E * size**-0.5
        if bias is not None:
            scores, scale = scores * scale + lax.broadcast_in_dim(bias, scores.shape, [1]), 1.0
        elif last:
            places = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            scores = jnp.where(places < plan.rest, scores, _MASKED)
        plgpu.barrier_arrive(k_used.at[slot])
        higher = jnp.maximum(highest, scores.max(axis=1) * scale)
        shrink = jnp.exp2(highest - higher)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(higher, scores.shape, [0]))
        total = total * shrink + weights.sum(axis=1)
        sums = tuple(x * lax.broadcast_in_dim(shrink, x.shape, [0]) for x in sums)
        weights = weights.astype(q_ref.dtype)
        # All of this comes before the wait.
        higher, total, sums, weights = lax.optimization_barrier((higher, total, sums, weights))
        plgpu.barrier_wait(v_here.at[slot])

        def add(refs):
            for ref, value in zip(refs, values.tiles, strict=True):
                plgpu.wgmma(ref, weights, value.at[slot, part])

        sums = pl.run_state(add)(tuple(_ACC.init(x) for x in sums))
        plgpu.barrier_arrive(v_used.at[slot])
        return higher, total, tuple(sums)

    carry: Any = lax.fori_loop(0, plan.full, step, _nothing(plan))
    carry = step(None, carry, last=True) if plan.last else carry
    _, total, sums = carry
    for x, tile in zip(sums, queries.tiles, strict=True):
        tile[group] = (x / lax.broadcast_in_dim(total, x.shape, [0])).astype(q_ref.dtype)
    plgpu.commit_smem()
    for (first, width), piece in zip(plan.pieces, queries.rows, strict=True):
        # Rows beyond the last query are not written.
        target = out_ref.at[(*place, pl.ds(first, width))]
        plgpu.copy_smem_to_gmem(piece.at[group], target)
    plgpu.wait_smem_to_gmem(0)


def _nothing(plan: Plan):
    """Start with the highest score, the sum of weights and that of values of no keys."""
    by_row = plgpu.Layout.WGMMA.reduce(1)
    highest = plgpu.layout_cast(jnp.full((_ROWS,), -jnp.inf, jnp.float32), by_row)
    total = plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), by_row)
    sums = (jnp.zeros((_ROWS, width), jnp.float32) for _, width in plan.pieces)
    return highest, total, tuple(plgpu.layout_cast(x, plgpu.Layout.WGMMA) for x in sums)
