"""Estimate how long a GPU program takes, from the text of the program that XLA compiled.

Every kernel takes as long as its memory traffic or its arithmetic, whichever is longer, and a
launch. The rates are an H100's as measured, not as advertised; see `RATES`.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Per second. Products and attention are what cuBLAS and cuDNN reach on large shapes in bfloat16.
RATES = {
    "bytes": 2.8e12,
    "product": 650e12,
    "product in float32": 45e12,
    "product in float8": 1100e12,
    "attention": 420e12,
    "instructions": 26e12,
}
LAUNCH = 2.5e-6
PROCESSORS = 132
# Tiles of a matrix product, and how fast each is beside the largest.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.85), (64, 128, 0.7), (64, 64, 0.5))
ATTENTION_TILE, BACKWARD = 128, 2.5
# A sort of 32 rows of 1,024 was measured; rows beyond two a processor wait.
SORT, SORT_STAGES = 116e-6, 55

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
_BYTES["f8e4m3fn"] = 1
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota", "after-all"}
_FREE_IN_FUSIONS = _FREE | {"broadcast", "reshape", "slice", "dynamic-slice", "fusion", "transpose"}
# Instructions for one result: comparisons and whole numbers run at half rate, and what is done to
# the outcome of a comparison is mostly part of it.
_INSTRUCTIONS = {"erf": 25, "exponential": 10, "log": 12, "divide": 6, "rsqrt": 4, "sqrt": 6}
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
        kind: "product", "attention", "sort" or "other".
        times: how often it runs.
        seconds: of one run.
        bytes: memory traffic of one run; 0 where that does not decide.
        flops: of one run's matrix products.
        result: its result's type.
        source: the operation in the JAX program that it mainly comes from.
    """

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
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
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
        elif instruction.op not in _FREE:
            operands = [by_name[name] for name in instruction.operands if name in by_name]
            body = computations[called] if instruction.op == "fusion" else []
            kind, seconds, traffic, flops = _cost(instruction, operands, body)
            result = " ".join(f"{k}{list(s)}" for k, s in instruction.shapes[:1])
            source = (_attribute(instruction, r'op_name="([^"]*)"') or "").split("/")[-1]
            yield Kernel(kind, times, seconds + LAUNCH, traffic, flops, result, source)


def _cost(instruction, operands, body) -> tuple[str, float, float, float]:
    target = _attribute(instruction, r'custom_call_target="([^"]*)"') or ""
    traffic = sum(operand.bytes for operand in operands) + instruction.bytes
    if "cublas" in target:
        return "product", *_product(instruction, operands[0], traffic)
    if "fmha" in target:
        return "attention", *_attention(operands, "ackward" in target)
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


def _product(instruction, left, traffic) -> tuple[float, float, float]:
    """Time a matrix product in whole waves of tiles, for the tile that suits it best."""
    contracted = _attribute(instruction, r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
    kind, shape = left.shapes[0]
    depth = math.prod(shape[int(axis.strip('"'))] for axis in contracted.split(",") if axis)
    *batch, rows, columns = (1, 1, *instruction.shapes[0][1])
    flops = 2 * math.prod(batch) * rows * columns * depth
    if kind == "f32":
        return max(flops / RATES["product in float32"], traffic / RATES["bytes"]), traffic, flops
    best = 0.0
    for height, width, speed in TILES:
        tiles = math.prod(batch) * math.ceil(rows / height) * math.ceil(columns / width)
        waves = math.ceil(tiles / PROCESSORS)
        used = math.prod(batch) * rows * columns / (waves * PROCESSORS * height * width)
        best = max(best, used * speed)
    rate = RATES["product in float8" if kind.startswith("f8") else "product"]
    return max(flops / rate / best, traffic / RATES["bytes"]), traffic, flops


def _attention(operands, backward) -> tuple[float, float, float]:
    """Time attention on whole tiles; its N x N arrays never reach memory, a bias does."""
    batch, queries, heads, size = operands[0].shapes[0][1]
    keys = operands[1].shapes[0][1][1]
    padded = [math.ceil(tokens / ATTENTION_TILE) * ATTENTION_TILE for tokens in (queries, keys)]
    work = 4 * batch * heads * size * math.prod(padded) * (BACKWARD if backward else 1)
    pairs = (operand for operand in operands if operand.shapes[0][1][-2:] == (queries, keys))
    bias = sum(operand.bytes for operand in pairs)
    seconds = max(work / RATES["attention"], bias / RATES["bytes"])
    return seconds, bias, 4 * batch * heads * size * queries * keys


def _sort(instruction) -> float:
    *rows, length = instruction.shapes[0][1]
    stages = math.ceil(math.log2(length))
    waves = math.ceil(math.prod(rows) / (2 * PROCESSORS))
    return SORT * waves * stages * (stages + 1) / 2 / SORT_STAGES


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
            elif user.op in ("bitcast", "transpose", "reshape", "convert"):
                amount += read(user.name, whole)
            elif not (user.op in _IN_PLACE and user.operands[0] == name):
                return whole
        return min(amount, whole)

    by_name = {part.name: part for part in body}
    root = next(part for part in body if part.root)
    written = instruction.bytes
    if root.op in _IN_PLACE:
        written = by_name[root.operands[_IN_PLACE[root.op]]].bytes
    inputs = (part for part in body if part.op == "parameter")
    return written + sum(read(part.name, part.bytes) for part in inputs)


def _instructions(part: Instruction, parts: dict[str, Instruction]) -> float:
    if part.op in _FREE_IN_FUSIONS or not part.shapes:
        return 0.0
    kind, first = part.shapes[0][0], parts.get(part.operands[0]) if part.operands else None
    if part.op == "reduce" and first:
        return (2.0 if kind in ("s32", "u32") else 1.0) * first.numbers
    if part.op == "convert" and first and first.shapes[0][0] == "pred":
        return 0.0
    if part.op in _LOGIC and kind == "pred":
        return 0.5 * part.numbers
    if part.op in _HALF_RATE or (kind in ("s32", "u32", "s8") and part.op in ("add", "subtract")):
        return 2.0 * part.numbers
    return float(_INSTRUCTIONS.get(part.op, 1) * part.numbers)
