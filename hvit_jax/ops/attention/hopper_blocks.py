"""What the kernels of `hopper` share, in Pallas (Mosaic GPU): how the work is cut, and fetched.

A block of threads works for a few rows of one head, and goes over blocks of keys: one warpgroup
fetches these, the others compute. Any number of tokens will do, since the copy engine fills up with
zeros what it reads beyond them and leaves out what it writes there.
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

from hvit_jax.ops.arrays import pad_end

# Rows of a warpgroup's matrix instructions; keys of a block, and what the last one's are filled up
# to: Mosaic multiplies as many weights and values at a time as 128 bytes hold; scores by the eight.
ROWS, KEYS, _LAST_KEYS, _SCORED_KEYS = 64, 128, 64, 8
_STAGES = 2
# Channels that a bias of keys takes: those of one matrix instruction.
BIAS = 16
# Stands for -inf, where -inf - (-inf) would make NaN. A power of two, whose product with a scale is
# exact: where no key of a block counts, what it is rounded by would be a score, and a huge one.
MASKED = -(2.0**100)
LOG2_E = math.log2(math.e)
# JAX's own kernels take it from here too.
ACC: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        groups: warpgroups that compute, each 64 rows of queries; one more fetches.
        pieces: where the pieces of a head's channels start, and their widths. The copy engine
            scatters a piece over shared memory as the matrix instructions read it.
        full: blocks of 128 keys.
        rest: keys behind them.
        last: the same filled up, a block of its own; 0 if there are none.
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
        full, rest = divmod(keys, KEYS)
        # Three groups hide each other's softmax; wider heads leave registers for two.
        groups = 3 if size <= 64 else 2
        last = -(-rest // _LAST_KEYS) * _LAST_KEYS
        return cls(groups, tuple(pieces), full, rest, last, LOG2_E * size**-0.5)

    @property
    def stages(self) -> int:
        """Blocks of keys and values that are under way or in use at a time."""
        return min(_STAGES, self.full + (self.last > 0))

    def tiles(self, rows: int) -> int:
        """Count the blocks of threads that a head's rows take."""
        return pl.cdiv(rows, self.groups * ROWS)

    @property
    def padded(self) -> int:
        """Keys of whole blocks."""
        return self.full * KEYS + self.last

    @property
    def scored(self) -> int:
        """Keys of the last block that queries are multiplied by; the others' scores are none."""
        return -(-self.rest // _SCORED_KEYS) * _SCORED_KEYS

    def length(self, block: int) -> int:
        """Count the keys of a block."""
        return KEYS if block < self.full else self.last

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that computes, and of one that fetches."""
        return (160, 32) if self.groups == 3 else (232, 40)


@dataclass(frozen=True)
class Buffer:
    """A head's channels in shared memory, piece by piece, as two views of the same bytes.

    The copy engine takes any number of tokens in rows of a piece; the matrix instructions want
    tiles of eight of these rows, which lie in the same order. Those of a bias are a piece more.
    """

    rows: Sequence[Any]
    tiles: Sequence[Any]

    @staticmethod
    def shape(plan: Plan, dtype: Any, *leading: int, bias: bool = False) -> list[plgpu.RefUnion]:
        """Make room for so many times so many rows."""
        unions = []
        for width in (*(width for _, width in plan.pieces), *[BIAS] * bias):
            views, row = ((), ()), width * jnp.dtype(dtype).itemsize
            if row > 16:  # The copy engine scatters pieces of 16 bytes.
                swizzle = plgpu.SwizzleTransform(row)
                tiling = plgpu.TilingTransform((8, width))
                views = (swizzle,), (tiling, swizzle)
            unions.append(
                plgpu.RefUnion(
                    *(plgpu.SMEM((*leading, width), dtype, transforms=view) for view in views)
                )
            )
        return unions

    @classmethod
    def of(cls, unions: Sequence[Any]) -> Buffer:
        """Take the two views of what `shape` made."""
        return cls([union[0] for union in unions], [union[1] for union in unions])


@dataclass(frozen=True)
class Stream:
    """Blocks of keys or values on their way through shared memory.

    Attributes:
        source: where they come from, and the number of the first head there.
        buffer: where they are put, a few at a time.
        here: tell that a block has arrived.
        used: tell that it may be written over.
        bias: numbers of the keys, or channels: where they come from, and where they are put.
    """

    source: tuple[Any, int]
    buffer: Buffer
    here: Any
    used: Any
    bias: tuple[Any, Any] | None = None

    def copy(self, plan: Plan, span: Any, slot: Any, part: Any) -> None:
        """Start to copy some keys or values."""
        image, head, here = lax.axis_index("image"), lax.axis_index("head"), self.here.at[slot]
        _copy_pieces(plan, self.source, (image, span, head), self.buffer, (slot, part), here)
        if self.bias is not None:
            source, target = self.bias
            row = source.at[image, 0 if source.shape[1] == 1 else head, span]
            plgpu.copy_gmem_to_smem(row, target.at[slot, part], here)


@dataclass(frozen=True)
class Weights:
    """Weights of pairs on their way through shared memory, for all rows of a block of threads.

    Attributes:
        source: where they come from, an array (B * H, Nq, Nk).
        buffer: where they are put, as the results of matrix instructions lie.
        here: tell that a block has arrived.
        used: tell that it may be written over.
    """

    source: Any
    buffer: Any
    here: Any
    used: Any

    @staticmethod
    def shape(plan: Plan, dtype: Any) -> Any:
        """Make room in shared memory."""
        views = plgpu.TilingTransform((8, KEYS // 2)), plgpu.SwizzleTransform(KEYS)
        return plgpu.SMEM((plan.stages, plan.groups * ROWS, KEYS), dtype, transforms=views)

    def copy(self, plan: Plan, span: Any, slot: Any, part: Any) -> None:
        """Start to copy those of all rows and some keys."""
        head = lax.axis_index("image") * lax.axis_size("head") + lax.axis_index("head")
        count = plan.groups * ROWS
        rows = pl.ds(lax.axis_index("tile") * count, count)
        # Of a shorter last block too: only a whole one lies in one piece.
        tile = self.source.at[head, rows, pl.ds(span.start, KEYS)]
        plgpu.copy_gmem_to_smem(tile, self.buffer.at[slot], self.here.at[slot])

    def load(self, group: Any, slot: Any, part: Any) -> Any:
        """Wait for those of a group's rows and some keys, and read them."""
        plgpu.barrier_wait(self.here.at[slot])
        tile = self.buffer[slot, pl.ds(group * ROWS, ROWS), part]
        tile = plgpu.layout_cast(tile, plgpu.Layout.WGMMA)
        plgpu.barrier_arrive(self.used.at[slot])
        return tile


@dataclass(frozen=True)
class Rows:
    """The rows that a warpgroup works for, in shared memory.

    Attributes:
        buffer: all groups' rows.
        group: this one.
        start: the number of its first row.
        place: where they are in an array (B, N, H, D).
    """

    buffer: Buffer
    group: Any
    start: Any
    place: tuple[Any, ...]

    def numbers(self, ref) -> Any:
        """Find the rows' numbers in an array (B, H, N)."""
        image, span, head = self.place
        return ref.at[image, head, span]


def launch(plan: Plan, kernel, rows: jax.Array | jax.ShapeDtypeStruct, results):
    """Make a kernel of `results` whose blocks of threads go over the rows of (B, N, H, D)."""
    batch, tokens, heads, _ = rows.shape
    run = plgpu.kernel(
        kernel,
        out_type=results,
        grid=(heads, plan.tiles(tokens), batch),
        grid_names=("head", "tile", "image"),
        num_threads=plan.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    # Else JAX_ENABLE_X64 would give some of a kernel's whole numbers 64 bits, and others 32.
    return jax.enable_x64(False)(run)


def whole_blocks(plan: Plan, numbers: Float[Array, "B h N"]) -> Float[Array, "B h M"]:
    """Fill up numbers of keys: the copy engine takes only rows of whole 16 bytes."""
    return pad_end(numbers, plan.padded - numbers.shape[-1], axis=-1)


def numbers_of_rows(x: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describe an array of a number for every row of (B, N, H, D), of whole warpgroups."""
    batch, tokens, heads, _ = x.shape
    return jax.ShapeDtypeStruct((batch, heads, pl.cdiv(tokens, ROWS) * ROWS), jnp.float32)


def shared_numbers(count: int, length: int, ref) -> Any:
    """Make room in shared memory for numbers of an array; None if there is no such array."""
    return None if ref is None else plgpu.SMEM((count, length), jnp.float32)


def arrived(plan: Plan, count: int, *, bias: bool = False) -> plgpu.Barrier:
    """Make barriers that open when all pieces of a block are there, and its bias."""
    return plgpu.Barrier(num_arrivals=len(plan.pieces) + bias, num_barriers=count)


def split(plan: Plan, tokens: int, compute, *streams: Stream | Weights) -> None:
    """Let the last warpgroup fetch, and those that have some of the tokens' rows compute.

    The last ones of a head may have none. They only keep in step: every block that was fetched
    waits until all have used it.
    """
    group = lax.axis_index("group")

    @pl.when(group < plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[0], action="increase")
        start = _first_row(plan)
        pl.when(start < tokens)(compute)
        pl.when(start >= tokens)(lambda: _skip(plan, *streams))

    @pl.when(group == plan.groups)
    def _():
        plgpu.set_max_registers(plan.registers[1], action="decrease")
        _fetch(plan, *streams)


def _fetch(plan: Plan, *streams: Stream | Weights) -> None:
    """Copy block after block of keys, their bias, weights and values to shared memory."""

    def copy(block, slot, length: int, *, reuse: bool):
        # A start that is known only when the kernel runs may lie less than a block from the end.
        span, part = pl.ds(jnp.int32(block) * KEYS, length), pl.ds(0, length)
        for stream in streams:
            if reuse:
                plgpu.barrier_wait(stream.used.at[slot])
            stream.copy(plan, span, slot, part)

    for block in range(plan.stages):
        copy(block, block, plan.length(block), reuse=False)

    @pl.loop(plan.stages, max(plan.full, plan.stages))
    def _(block):
        copy(block, lax.rem(block, jnp.int32(plan.stages)), KEYS, reuse=True)

    if plan.last and plan.full >= plan.stages:
        copy(plan.full, plan.full % plan.stages, plan.last, reuse=True)


def _skip(plan: Plan, *streams: Stream | Weights) -> None:
    """Take no part in what is fetched."""

    def step(block, carry, *, last: bool = False):
        slot, _ = slot_of(plan, block, last)
        for stream in streams:
            plgpu.barrier_wait(stream.here.at[slot])
            plgpu.barrier_arrive(stream.used.at[slot])
        return carry

    loop(plan, step, ())


def _first_row(plan: Plan) -> Any:
    """Count the rows before this warpgroup's."""
    return (lax.axis_index("tile") * plan.groups + lax.axis_index("group")) * ROWS


def rows_of_group(plan: Plan, buffer: Buffer) -> Rows:
    """Find the rows that this warpgroup works for."""
    image, head, group = (lax.axis_index(name) for name in ("image", "head", "group"))
    start = _first_row(plan)
    return Rows(buffer, group, start, (image, pl.ds(start, ROWS), head))


def fetched_rows(plan: Plan, source, buffer: Buffer, here) -> Rows:
    """Fetch the rows that this warpgroup works for, and wait for them."""
    rows = rows_of_group(plan, buffer)
    _copy_pieces(plan, source, rows.place, buffer, rows.group, here.at[rows.group])
    plgpu.barrier_wait(here.at[rows.group])
    return rows


def write_rows(plan: Plan, rows: Rows, values, out_ref) -> None:
    """Start to write the rows' vectors, given piece by piece; those beyond the last are left out.

    What was put into shared memory before may be written behind this too.
    """
    for x, tile in zip(values, rows.buffer.tiles, strict=False):
        tile[rows.group] = x.astype(out_ref.dtype)
    plgpu.commit_smem()
    for (first, width), piece in zip(plan.pieces, rows.buffer.rows, strict=False):
        target = out_ref.at[(*rows.place, pl.ds(first, width))]
        plgpu.copy_smem_to_gmem(piece.at[rows.group], target)


def _copy_pieces(plan, source, place, buffer: Buffer, slot, barrier) -> None:
    (ref, first), (image, span, head) = source, place
    for (start, width), piece in zip(plan.pieces, buffer.rows, strict=False):
        part = ref.at[image, span, first + head, pl.ds(start, width)]
        plgpu.copy_gmem_to_smem(part, piece.at[slot], barrier)


def loop(plan: Plan, step, carry):
    """Run a step for every block of keys."""
    carry = lax.fori_loop(0, plan.full, step, carry)
    return step(None, carry, last=True) if plan.last else carry


def slot_of(plan: Plan, block, last: bool) -> tuple[Any, Any]:
    """Find a block of keys or values in the shared memory."""
    slot = plan.full % plan.stages if last else lax.rem(block, jnp.int32(plan.stages))
    return slot, pl.ds(0, plan.last if last else KEYS)


def without_spare(plan: Plan, x, value: float):
    """Put a value in place of what belongs to keys by which the last block is filled up.

    The compiler sees where that is, and leaves out the arithmetic there.
    """
    places = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(places < plan.rest, x, value)


def number_a_row(value: float):
    """Give every row of the matrix instructions the same number."""
    numbers = jnp.full((ROWS,), value, jnp.float32)
    return plgpu.layout_cast(numbers, plgpu.Layout.WGMMA.reduce(1))


def no_sums(plan: Plan) -> tuple[Any, ...]:
    """Start with sums of no values, piece by piece."""
    sums = (jnp.zeros((ROWS, width), jnp.float32) for _, width in plan.pieces)
    return tuple(plgpu.layout_cast(x, plgpu.Layout.WGMMA) for x in sums)


def add_values(sums, weights, values: Buffer, slot, part) -> tuple[Any, ...]:
    """Add a block of values to the sums, multiplied by the rows' weights."""

    def add(refs):
        for ref, value in zip(refs, values.tiles, strict=True):
            plgpu.wgmma(ref, weights, value.at[slot, part])

    return tuple(pl.run_state(add)(tuple(ACC.init(x) for x in sums)))
