"""The kernel of `hopper`, in Pallas (Mosaic GPU).

A block of threads attends for a few rows of one head: one warpgroup fetches blocks of keys and
values, the others compute. Any number of tokens will do, since the copy engine fills up with zeros
what it reads beyond them and leaves out what it writes there.

Both operations are jitted, so that a program writes the kernel once for all blocks of one size.
"""

from __future__ import annotations

import functools
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
        scale: of scores, in base 2.
    """

    groups: int
    pieces: tuple[tuple[int, int], ...]
    full: int
    rest: int
    last: int
    scale: float

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
        last = -(-rest // _LAST_KEYS) * _LAST_KEYS
        return cls(groups, tuple(pieces), full, rest, last, _LOG2_E * size**-0.5)

    @property
    def stages(self) -> int:
        """Blocks of keys and values that are under way or in use at a time."""
        return min(_STAGES, self.full + (self.last > 0))

    def tiles(self, rows: int) -> int:
        """Count the blocks of threads that a head's rows take."""
        return pl.cdiv(rows, self.groups * _ROWS)

    def length(self, block: int) -> int:
        """Count the keys of a block."""
        return _KEYS if block < self.full else self.last

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that fetches."""
        return (160, 32) if self.groups == 3 else (232, 40)


@functools.partial(jax.jit, static_argnums=4)
def attend(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
    key_bias: Float[Array, "B h Nk"] | None,
    keys: int | None = None,
) -> Float[Array, "B Nq H D"]:
    """Attend; see `hvit_jax.ops.attention.hopper.attend`. It has no gradient."""
    return _attend(q, k, v, key_bias, keys or k.shape[1], logs=False)[0]


@functools.partial(jax.jit, static_argnums=1)
def attend_joined(x: Float[Array, "B N H3 D"], keys: int) -> Float[Array, "B N H3//3 D"]:
    """Attend; see `hvit_jax.ops.attention.hopper.attend_joined`. It has no gradient."""
    heads = x.shape[2] // 3
    return _attend(x, x, x, None, keys, logs=False, first=(0, heads, 2 * heads))[0]


@jax.jit
def attend_and_score(
    q: Float[Array, "B Nq H D"],
    k: Float[Array, "B Nk H D"],
    v: Float[Array, "B Nk H D"],
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


def _attend(q, k, v, key_bias, keys: int, *, logs: bool, first=(0, 0, 0)) -> tuple[Array, ...]:
    """Attend; `first` numbers the first head of q, k and v each in its array."""
    batch, rows, heads, size = *q.shape[:2], v.shape[2] - first[2], q.shape[3]
    plan = Plan.of(keys, size)
    arrays = [q, k, v]
    if key_bias is not None:
        bias = key_bias.astype(jnp.float32)[..., :keys] * _LOG2_E
        arrays.append(_padded_bias(plan, jnp.maximum(bias, _MASKED)))
    out = jax.ShapeDtypeStruct((batch, rows, heads, size), q.dtype)
    results = [out, _numbers_of_rows(plan, out)][: 1 + logs]

    def hopper_attention(q_ref, k_ref, v_ref, *refs):
        bias_ref, refs = (None, refs) if key_bias is None else (refs[0], refs[1:])
        q, k, v = zip((q_ref, k_ref, v_ref), first, strict=True)
        _run(plan, q, k, v, bias_ref, refs[0], refs[1] if logs else None)

    return tuple(_launch(plan, hopper_attention, out, results)(*arrays))


def _column_sums(
    q: Float[Array, "B Nq H D"], k: Float[Array, "B Nk H D"], logs: Float[Array, "B H Nq"]
) -> Float[Array, "B H Nk"]:
    """Sum each key's weights over the queries, of whose sums there are logarithms in base 2."""
    plan = Plan.of(q.shape[1], q.shape[-1])

    def hopper_column_sums(k_ref, q_ref, bias_ref, out_ref):
        _run_columns(plan, k_ref, q_ref, bias_ref, out_ref)

    launch = _launch(plan, hopper_column_sums, k, [_numbers_of_rows(plan, k)])
    return launch(k, q, _padded_bias(plan, -logs))[0][..., : k.shape[1]]


def _launch(plan: Plan, kernel, rows: jax.Array | jax.ShapeDtypeStruct, results):
    """Make a kernel of `results` whose blocks of threads go over the rows of (B, N, H, D)."""
    batch, tokens, heads, _ = rows.shape
    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=(heads, plan.tiles(tokens), batch),
        grid_names=("head", "tile", "image"),
        num_threads=plan.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _padded_bias(plan: Plan, bias: Float[Array, "B h N"]) -> Float[Array, "B h M"]:
    """Mask the keys by which the last block is filled up."""
    spare = plan.full * _KEYS + plan.last - bias.shape[-1]
    return jnp.pad(bias, ((0, 0), (0, 0), (0, spare)), constant_values=_MASKED)


def _numbers_of_rows(plan: Plan, x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describe an array of a number for every row of (B, N, H, D), of whole blocks of threads."""
    rows = plan.tiles(x.shape[1]) * plan.groups * _ROWS
    return jax.ShapeDtypeStruct((x.shape[0], x.shape[2], rows), jnp.float32)


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


@dataclass(frozen=True)
class _Stream:
    """Blocks of keys or values on their way through shared memory.

    Attributes:
        source: where they come from, and the number of the first head there.
        buffer: where they are put, a few at a time.
        here: tell that a block has arrived.
        used: tell that it may be written over.
        bias: of the keys: where it comes from, and where it is put.
    """

    source: tuple[Any, int]
    buffer: _Buffer
    here: Any
    used: Any
    bias: tuple[Any, Any] | None = None


def _run(plan: Plan, q, k, v, bias_ref, out_ref, logs_ref) -> None:
    """Run one block of threads: a few rows of queries, and all keys."""
    dtype = out_ref.dtype
    biases, logs = _numbers(plan.stages, _KEYS, bias_ref), _numbers(plan.groups, _ROWS, logs_ref)

    def scoped(queries, keys, values, biases, logs, q_here, k_here, v_here, k_used, v_used):
        bias = None if bias_ref is None else (bias_ref, biases)
        key_stream = _Stream(k, _Buffer.of(keys), k_here, k_used, bias)
        value_stream = _Stream(v, _Buffer.of(values), v_here, v_used)

        def compute():
            rows = _rows_of_group(plan, q, _Buffer.of(queries), q_here)
            carry = _loop(
                plan, _attend_step(plan, rows, key_stream, value_stream, dtype), _nothing(plan)
            )
            highest, total, sums = carry
            if logs is not None:
                logs[rows.group] = highest + jnp.log(total) * _LOG2_E
            for x, tile in zip(sums, rows.buffer.tiles, strict=True):
                tile[rows.group] = (x / lax.broadcast_in_dim(total, x.shape, [0])).astype(dtype)
            plgpu.commit_smem()
            for (first, width), piece in zip(plan.pieces, rows.buffer.rows, strict=True):
                # Rows beyond the last query are not written.
                target = out_ref.at[(*rows.place, pl.ds(first, width))]
                plgpu.copy_smem_to_gmem(piece.at[rows.group], target)
            if logs is not None:
                plgpu.copy_smem_to_gmem(logs.at[rows.group], rows.numbers(logs_ref))
            plgpu.wait_smem_to_gmem(0)

        _split(plan, compute, lambda: _fetch(plan, key_stream, value_stream))

    pl.run_scoped(
        scoped,
        _Buffer.shape(plan, dtype, plan.groups, _ROWS),
        _Buffer.shape(plan, dtype, plan.stages, _KEYS),
        _Buffer.shape(plan, dtype, plan.stages, _KEYS),
        biases,
        logs,
        _arrived(plan, plan.groups),
        _arrived(plan, plan.stages, bias=bias_ref is not None),
        _arrived(plan, plan.stages),
        *[plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages)] * 2,
        collective_axes="group",
    )


def _run_columns(plan: Plan, k_ref, q_ref, bias_ref, out_ref) -> None:
    """Run one block of threads: sum the weights of a few keys over all queries."""

    def scoped(keys, queries, biases, sums, k_here, q_here, q_used):
        stream = _Stream((q_ref, 0), _Buffer.of(queries), q_here, q_used, (bias_ref, biases))

        def compute():
            rows = _rows_of_group(plan, (k_ref, 0), _Buffer.of(keys), k_here)

            def step(block, total, *, last: bool = False):
                scores = _scores(plan, rows, stream, block, last=last)
                return total + jnp.exp2(scores).sum(axis=1)

            sums[rows.group] = _loop(plan, step, _number_a_row(0.0))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums.at[rows.group], rows.numbers(out_ref))
            plgpu.wait_smem_to_gmem(0)

        _split(plan, compute, lambda: _fetch(plan, stream))

    pl.run_scoped(
        scoped,
        _Buffer.shape(plan, q_ref.dtype, plan.groups, _ROWS),
        _Buffer.shape(plan, q_ref.dtype, plan.stages, _KEYS),
        _numbers(plan.stages, _KEYS, bias_ref),
        _numbers(plan.groups, _ROWS, out_ref),
        _arrived(plan, plan.groups),
        _arrived(plan, plan.stages, bias=True),
        plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
        collective_axes="group",
    )


def _numbers(count: int, length: int, ref) -> Any:
    return None if ref is None else plgpu.SMEM((count, length), jnp.float32)


def _arrived(plan: Plan, count: int, *, bias: bool = False) -> plgpu.Barrier:
    return plgpu.Barrier(num_arrivals=len(plan.pieces) + bias, num_barriers=count)


def _split(plan: Plan, compute, fetch) -> None:
    """Let the last warpgroup fetch, and the others compute with most of the registers."""

    @pl.when(lax.axis_index("group") < plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[0], action="increase")
        compute()

    @pl.when(lax.axis_index("group") == plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[1], action="decrease")
        fetch()


def _fetch(plan: Plan, *streams: _Stream) -> None:
    """Copy block after block of keys, their bias and values to shared memory."""
    image, head = lax.axis_index("image"), lax.axis_index("head")

    def copy(block, slot, length: int, *, reuse: bool):
        # A start that is known only when the kernel runs may lie less than a block from the end.
        span, part = pl.ds(jnp.int32(block) * _KEYS, length), pl.ds(0, length)
        for stream in streams:
            if reuse:
                plgpu.barrier_wait(stream.used.at[slot])
            here = stream.here.at[slot]
            _copy_pieces(
                plan, stream.source, (image, span, head), stream.buffer, (slot, part), here
            )
            if stream.bias is not None:
                source, target = stream.bias
                row = source.at[image, 0 if source.shape[1] == 1 else head, span]
                plgpu.copy_gmem_to_smem(row, target.at[slot, part], here)

    for block in range(plan.stages):
        copy(block, block, plan.length(block), reuse=False)

    @pl.loop(plan.stages, max(plan.full, plan.stages))
    def _(block):
        copy(block, lax.rem(block, jnp.int32(plan.stages)), _KEYS, reuse=True)

    if plan.last and plan.full >= plan.stages:
        copy(plan.full, plan.full % plan.stages, plan.last, reuse=True)


def _copy_pieces(plan, source, place, buffer: _Buffer, slot, barrier) -> None:
    (ref, first), (image, span, head) = source, place
    for (start, width), piece in zip(plan.pieces, buffer.rows, strict=True):
        part = ref.at[image, span, first + head, pl.ds(start, width)]
        plgpu.copy_gmem_to_smem(part, piece.at[slot], barrier)


@dataclass(frozen=True)
class _Rows:
    """The rows that a warpgroup works for, in shared memory.

    Attributes:
        buffer: all groups' rows.
        group: this one.
        start: the number of its first row.
        place: where they are in an array (B, N, H, D).
    """

    buffer: _Buffer
    group: Any
    start: Any
    place: tuple[Any, ...]

    def numbers(self, ref) -> Any:
        """Find the rows' numbers in an array (B, H, N)."""
        image, span, head = self.place
        return ref.at[image, head, span]


def _rows_of_group(plan: Plan, source, buffer: _Buffer, here) -> _Rows:
    image, head, group = (lax.axis_index(name) for name in ("image", "head", "group"))
    start = (lax.axis_index("tile") * plan.groups + group) * _ROWS
    place = image, pl.ds(start, _ROWS), head
    _copy_pieces(plan, source, place, buffer, group, here.at[group])
    plgpu.barrier_wait(here.at[group])
    return _Rows(buffer, group, start, place)


def _loop(plan: Plan, step, carry):
    """Run a step for every block of keys."""
    carry = lax.fori_loop(0, plan.full, step, carry)
    return step(None, carry, last=True) if plan.last else carry


def _slot(plan: Plan, block, last: bool) -> tuple[Any, Any]:
    """Find a block of keys or values in the shared memory."""
    slot = plan.full % plan.stages if last else lax.rem(block, jnp.int32(plan.stages))
    return slot, pl.ds(0, plan.last if last else _KEYS)


def _scores(plan: Plan, rows: _Rows, keys: _Stream, block, *, last: bool):
    """Multiply rows and a block of keys; scaled, with the bias if there is one, in base 2.

    In base 2 the hardware takes exponentials.
    """
    slot, part = _slot(plan, block, last)
    plgpu.barrier_wait(keys.here.at[slot])
    bias = None
    if keys.bias is not None:  # Read while the products run.
        bias = plgpu.layout_cast(keys.bias[1][slot, part], plgpu.Layout.WGMMA.reduce(0))

    def products(scores):
        for row, key in zip(rows.buffer.tiles, keys.buffer.tiles, strict=True):
            turned = plgpu.transpose_ref(key.at[slot, part], (1, 0))
            plgpu.wgmma(scores, row.at[rows.group], turned)
        return scores[...]

    length = plan.last if last else _KEYS
    scores = pl.run_scoped(products, _ACC((_ROWS, length), jnp.float32))
    if bias is not None:
        scores = scores * plan.scale + lax.broadcast_in_dim(bias, scores.shape, [1])
    elif last:
        places = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(places < plan.rest, scores, _MASKED)
    plgpu.barrier_arrive(keys.used.at[slot])
    return scores


def _attend_step(plan: Plan, rows: _Rows, keys: _Stream, values: _Stream, dtype):
    """Make the step of a softmax that grows block by block."""

    def step(block, carry, *, last: bool = False):
        highest, total, sums = carry
        slot, part = _slot(plan, block, last)
        scores = _scores(plan, rows, keys, block, last=last)
        # Without a bias the scale is applied with the subtraction.
        scale = plan.scale if keys.bias is None else 1.0
        higher = jnp.maximum(highest, scores.max(axis=1) * scale)
        shrink = jnp.exp2(highest - higher)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(higher, scores.shape, [0]))
        total = total * shrink + weights.sum(axis=1)
        sums = tuple(x * lax.broadcast_in_dim(shrink, x.shape, [0]) for x in sums)
        weights = weights.astype(dtype)
        # All of this comes before the wait.
        higher, total, sums, weights = lax.optimization_barrier((higher, total, sums, weights))
        plgpu.barrier_wait(values.here.at[slot])

        def add(refs):
            for ref, value in zip(refs, values.buffer.tiles, strict=True):
                plgpu.wgmma(ref, weights, value.at[slot, part])

        sums = pl.run_state(add)(tuple(_ACC.init(x) for x in sums))
        plgpu.barrier_arrive(values.used.at[slot])
        return higher, total, tuple(sums)

    return step


def _nothing(plan: Plan):
    """Start with the highest score, the sum of weights and that of values of no keys."""
    sums = (jnp.zeros((_ROWS, width), jnp.float32) for _, width in plan.pieces)
    sums = tuple(plgpu.layout_cast(x, plgpu.Layout.WGMMA) for x in sums)
    return _number_a_row(-jnp.inf), _number_a_row(0.0), sums


def _number_a_row(value: float):
    numbers = jnp.full((_ROWS,), value, jnp.float32)
    return plgpu.layout_cast(numbers, plgpu.Layout.WGMMA.reduce(1))
