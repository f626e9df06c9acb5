"""Estimate how long a GPU program takes, from the text of the program that XLA compiled.

Every kernel takes as long as its memory traffic or its arithmetic, whichever is longer, and the
GPU idles before the next. The rates are those of an NVIDIA H200 in the middle of a long run, when
it holds a lower clock than in a short one. An H100 has the same processors and slower memory.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from hvit_jax.ops.attention.hopper_blocks import BIAS, KEYS, ROWS, Plan

# Per second. "Measured" is benchmarks/results/nvidia-h200.json: of the kernels in its profiles, a
# few percent less, by which its rows take longer than their profiles say.
RATES = {
    # LayerNorm and other fusions of 60 to 270 MB.
    "bytes": 3.0e12,
    # Products of all rows; the largest alone, at the start of the run, reached 741e12.
    "product": 705e12,
    "product in float8": 1200e12,
    # Two thirds of the 67e12 that NVIDIA promises.
    "product in float32": 45e12,
    # Half of bfloat16's; not measured.
    "product in TF32": 350e12,
    # 477 us for (32, 1025, 16, 64), see docs/performance.md.
    "attention of cuDNN": 365e12,
    # By the number of warpgroups that hide each other's softmax: heads of 64 and of 80 channels.
    "own attention": {3: 500e12, 2: 420e12},
    # 128 lanes of every processor at 1.55 GHz.
    "instructions": 26e12,
    # By the bytes of what is compared: 16,384 rows of 1,024 numbers of 32 and of 64 bits, and of
    # 1,025 and 1,370, three arrays of 32 bits sorted together.
    "comparisons of a sort": {4: 2.4e12, 8: 1.35e12, 12: 1.2e12},
}
# Between two kernels (idle_ms / launches: 0.5 to 1.4 us), and what the smallest kernels take.
IDLE, SHORTEST = 1.4e-6, 1.5e-6
PROCESSORS = 132
# cuBLAS has kernels for tiles of 128 by any of these.
WIDTHS = range(96, 289, 32)
# Of cuDNN; and how often attention's work its backward pass is.
ATTENTION_TILE, BACKWARD = 128, 2.5
# What a block of our kernel takes beside its products: 513, 257 tokens against 1,025.
ATTENTION_START = 3.6e-6
# Memory is written in pieces of this size, in bytes.
SECTOR = 32

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES |= {"f8e4m3fn": 1, "s64": 8}
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all"}
_FREE_IN_FUSIONS = _FREE | {"broadcast", "reshape", "slice", "dynamic-slice", "fusion", "transpose"}
# Instructions for one result: comparisons and whole numbers run at half rate, and what is done to
# the outcome of a comparison is mostly part of it.
_INSTRUCTIONS = {"erf": 25, "exponential": 10, "log": 12, "divide": 6, "rsqrt": 4, "sqrt": 6}
# 16 lanes of 128 count bits.
_INSTRUCTIONS |= {"popcnt": 8}
# Rounding to float8 with a limit, from passes that do nothing else.
_TO_FLOAT8 = 36
_HALF_RATE = {"compare", "select", "maximum", "minimum"}
# Operations that change their first operand where it is, and which operand holds what is new.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
_LOGIC = {"and", "or", "xor", "not"}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Instruction:
    """One line of a program: its name, type, operation, operands and attributes."""

    name: str
    shapes: list[tuple[str, tuple[int, ...]]]
    op: str
    operands: list[str]
    attributes: str
    root: bool

    @property
    def bytes(self) -> float:
        """Size of the result."""
        return sum(_BYTES[kind] * math.prod(shape) for kind, shape in self.shapes)

    @property
    def numbers(self) -> int:
        """Numbers of the result, the largest array of a tuple."""
        return max((math.prod(shape) for _, shape in self.shapes), default=0)


@dataclass(frozen=True)
class Kernel:
    """What one kernel costs.

    Attributes:
        name: of the instruction, as a profiler shows it.
        kind: "product", "attention", "sort" or "other".
        times: how often it runs.
        seconds: of one run.
        bytes: memory traffic of one run; 0 where that does not decide.
        flops: of one run's matrix products.
        result: its result's type.
        source: the operation in the JAX program that it mainly comes from.
    """

    name: str
    kind: str
    times: int
    seconds: float
    bytes: float
    flops: float
    result: str
    source: str


def kernels(text: str) -> list[Kernel]:
    """List the kernels of a compiled program.

    Args:
        text: the program, as `compiled.as_text()` gives it.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry, 1))


def total(listed: Iterable[Kernel]) -> float:
    """Add up the seconds of kernels."""
    return sum(kernel.times * kernel.seconds for kernel in listed)


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    found = _SHAPE.findall(text)
    return [(k, tuple(map(int, filter(None, s.split(","))))) for k, s in found if k in _BYTES]


def _closing(text: str, start: int) -> int:
    """Find the bracket that closes the one at `start`."""
    depth = 0
    for found in re.compile("[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"no closing bracket: {text}")


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations, current, entry = {}, [], ""
    for line in text.splitlines():
        head = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        rest = re.sub(r"/\*index=\d+\*/", "", match[3])
        end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
        kind, rest = rest[:end], rest[end:].strip()
        op = re.match(r"([\w\-]+)\(", rest)
        if op is None:
            continue
        close = _closing(rest, op.end() - 1)
        operands = re.findall(r"%([\w.\-]+)", rest[op.end() : close])
        instruction = Instruction(
            match[2], _shapes(kind), op[1], operands, rest[close:], bool(match[1])
        )
        current.append(instruction)
    return computations, entry


def _attribute(instruction: Instruction, pattern: str) -> str | None:
    found = re.search(pattern, instruction.attributes)
    return found[1] if found else None


def _walk(computations, name: str, times: int) -> Iterator[Kernel]:
    by_name = {instruction.name: instruction for instruction in computations[name]}
    for instruction in computations[name]:
        called = _attribute(instruction, r"(?:body|to_apply|calls)=%?([\w.\-]+)")
        if instruction.op == "while":
            trips = _attribute(instruction, r'known_trip_count":\{"n":"(\d+)"')
            yield from _walk(computations, called, times * int(trips or 1))
        elif instruction.op in ("call", "async-start") and called:
            yield from _walk(computations, called, times)
        elif instruction.op not in _FREE and not instruction.op.endswith("-done"):
            operands = [by_name[name] for name in instruction.operands if name in by_name]
            body = computations[called] if instruction.op.startswith("fusion") else []
            # What is started aside leaves no gap, and has its operands in its type too.
            idle = 0.0 if instruction.op.endswith("-start") else IDLE
            if body:
                root = next(part for part in body if part.root)
                instruction = dataclasses.replace(instruction, op="fusion", shapes=root.shapes)
            yield _kernel(instruction, times, idle, _cost(instruction, operands, body))


def _kernel(instruction, times: int, idle: float, cost) -> Kernel:
    kind, seconds, traffic, flops = cost
    result = " ".join(f"{k}{list(s)}" for k, s in instruction.shapes[:1])
    source = (_attribute(instruction, r'op_name="([^"]*)"') or "").split("/")[-1]
    seconds = max(seconds, SHORTEST) + idle
    return Kernel(instruction.name, kind, times, seconds, traffic, flops, result, source)


def _cost(instruction, operands, body) -> tuple[str, float, float, float]:
    """Give kind, seconds, memory traffic and operations of products."""
    for part in body:
        if part.op == "custom-call":  # What is around it cuts its operands from larger arrays.
            by_name = {part.name: part for part in body}
            return _cost(part, [by_name[name] for name in part.operands], [])
    target = _attribute(instruction, r'custom_call_target="([^"]*)"') or ""
    source = _attribute(instruction, r'op_name="([^"]*)"') or ""
    traffic = sum(operand.bytes for operand in operands) + instruction.bytes
    if "cublas" in target:
        return "product", *_product(instruction, operands)
    if "fmha" in target:
        return "attention", *_cudnn_attention(operands, "ackward" in target)
    if "mosaic" in target and "hopper_merging" not in source:
        return "attention", *_own_attention(operands, instruction, source)
    if instruction.op == "sort" or any(part.op == "sort" for part in body):
        return "sort", _sort(instruction), traffic, 0.0
    if body:
        traffic = _fusion_traffic(instruction, operands, body)
        parts = {part.name: part for part in body}
        arithmetic = sum(_instructions(part, parts) for part in body) / RATES["instructions"]
        return "other", max(traffic / RATES["bytes"], arithmetic), traffic, 0.0
    if instruction.op in ("gather", "slice", "dynamic-slice"):
        traffic = 2 * instruction.bytes
    return "other", traffic / RATES["bytes"], traffic, 0.0


def _product(instruction, operands) -> tuple[float, float, float]:
    """Time a matrix product in whole waves of tiles, for the tile that suits it best."""
    contracted = _attribute(instruction, r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
    # A second result is memory to work in.
    result = dataclasses.replace(instruction, shapes=instruction.shapes[:1])
    traffic = sum(operand.bytes for operand in operands) + result.bytes
    kind, shape = operands[0].shapes[0]
    depth = math.prod(shape[int(axis.strip('"'))] for axis in contracted.split(",") if axis)
    *batch, rows, columns = (1, 1, *instruction.shapes[0][1])
    flops = 2 * math.prod(batch) * rows * columns * depth
    if kind == "f32" and '["HIGHEST"' in instruction.attributes:
        return max(flops / RATES["product in float32"], traffic / RATES["bytes"]), traffic, flops
    best = 0.0
    for height, width in itertools.chain(*(((128, w), (w, 128)) for w in WIDTHS)):
        tiles = math.prod(batch) * math.ceil(rows / height) * math.ceil(columns / width)
        waves = math.ceil(tiles / PROCESSORS)
        used = math.prod(batch) * rows * columns / (waves * PROCESSORS * height * width)
        best = max(best, used)
    names = {"f32": "product in TF32", "f8e4m3fn": "product in float8"}
    rate = RATES[names.get(kind, "product")]
    return max(flops / rate / best, traffic / RATES["bytes"]), traffic, flops


def _cudnn_attention(operands, backward) -> tuple[float, float, float]:
    """Time attention on whole tiles; its N x N arrays never reach memory, a bias does."""
    batch, queries, heads, size = operands[0].shapes[0][1]
    keys = operands[1].shapes[0][1][1]
    padded = [math.ceil(tokens / ATTENTION_TILE) * ATTENTION_TILE for tokens in (queries, keys)]
    work = 4 * batch * heads * size * math.prod(padded) * (BACKWARD if backward else 1)
    pairs = (operand for operand in operands if operand.shapes[0][1][-2:] == (queries, keys))
    bias = sum(operand.bytes for operand in pairs)
    seconds = work / RATES["attention of cuDNN"] + bias / RATES["bytes"]
    return seconds, bias, 4 * batch * heads * size * queries * keys


def _own_attention(operands, instruction, source: str) -> tuple[float, float, float]:
    """Time our kernels in whole waves of their blocks, and weights of pairs, which are read.

    Sums of columns, and means of groups, which have no queries, take one product, not two.
    """
    sums, means = "hopper_column_sums" in source, "hopper_means" in source
    batch, rows, _, size = (instruction if means else operands[0]).shapes[0][1]
    heads = instruction.shapes[0][1][1 if sums else 2]
    keys = operands[0 if means else 1].shapes[0][1][1]
    products = 1 if sums or means else 2
    plan = Plan.of(keys, size)
    biased = len(operands) > 3 and len(operands[3].shapes[0][1]) == 4
    # A row's products with keys and with values, which fill up the last ones differently.
    scores = 0 if means else (plan.full * KEYS + plan.scored) * (size + BIAS * biased)
    values = 0 if sums else plan.padded * size
    waves = math.ceil(batch * heads * plan.tiles(rows) / PROCESSORS)
    # A warpgroup attends for 64 rows; of a head's last block some may have none.
    groups = math.ceil(rows / ROWS) / plan.tiles(rows)
    work = 2 * ROWS * groups * (scores + values)
    rate = RATES["own attention"][plan.groups] / PROCESSORS
    pairs = (x for x in operands if x.shapes[0][1][::2] == (batch * heads, plan.padded))
    read = sum(operand.bytes for operand in pairs)
    # The copy engine fetches weights of pairs while others are multiplied.
    seconds = max(waves * (ATTENTION_START + work / rate), read / RATES["bytes"])
    return seconds, read, 2 * products * batch * heads * rows * keys * size


def _sort(instruction) -> float:
    """Time a network that compares neighbours; a processor sorts a row at a time."""
    *rows, length = instruction.shapes[0][1]
    stages = math.ceil(math.log2(length))
    waves = math.ceil(math.prod(rows) / PROCESSORS)
    width = sum(_BYTES[kind] for kind, _ in instruction.shapes)
    rates = RATES["comparisons of a sort"]
    rate = rates[min((most for most in rates if width <= most), default=max(rates))]
    return waves * PROCESSORS * length * stages * (stages + 1) / 2 / rate


def _fusion_traffic(instruction, operands, body) -> float:
    """Count what a fusion reads and writes: of an array that it cuts from, only the cut."""
    users = collections.defaultdict(list)
    for part in body:
        for operand in part.operands:
            users[operand].append(part)

    def read(name: str, whole: float) -> float:
        amount = 0.0
        for user in users[name]:
            if user.op in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
                amount += user.bytes
            elif user.op in ("bitcast", "transpose", "reshape", "convert") and not user.root:
                amount += read(user.name, whole)
            elif not (user.op in _IN_PLACE and user.operands[0] == name):
                return whole
        return min(amount, whole)

    by_name = {part.name: part for part in body}
    root = next(part for part in body if part.root)
    written = instruction.bytes
    if root.op in _IN_PLACE:
        new = by_name[root.operands[_IN_PLACE[root.op]]]
        written = new.bytes
        if root.op == "scatter":
            window = _attribute(root, r"update_window_dims={([^}]*)}") or ""
            sizes = [new.shapes[0][1][int(axis)] for axis in window.split(",") if axis]
            # A row is written as a whole, a number of its own takes a sector with it.
            row = math.prod(sizes) * new.bytes / new.numbers
            written *= max(1.0, SECTOR / row)
    inputs = (part for part in body if part.op == "parameter")
    return written + sum(read(part.name, part.bytes) for part in inputs)


def _instructions(part: Instruction, parts: dict[str, Instruction]) -> float:
    if part.op in _FREE_IN_FUSIONS or not part.shapes:
        return 0.0
    kind, first = part.shapes[0][0], parts.get(part.operands[0]) if part.operands else None
    if part.op == "reduce" and first:
        return (2.0 if kind in ("s32", "u32") else 1.0) * first.numbers
    if part.op == "convert" and kind.startswith("f8"):
        return float(_TO_FLOAT8 * part.numbers)
    if part.op == "convert" and first and first.shapes[0][0] == "pred":
        return 0.0
    if part.op in _LOGIC and kind == "pred":
        return 0.5 * part.numbers
    if part.op in _HALF_RATE or (kind in ("s32", "u32", "s8") and part.op in ("add", "subtract")):
        return 2.0 * part.numbers
    return float(_INSTRUCTIONS.get(part.op, 1) * part.numbers)
