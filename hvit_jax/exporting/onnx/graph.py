"""An ONNX graph while it is made: values, nodes and constants."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from hvit_jax.errors import InputError

Shape = tuple[Any, ...]  # Numbers, and multiples of the batch where that is not known.


@dataclass(frozen=True, eq=False)
class Value:
    """An array of the graph: what a node computes, an input, or a constant.

    Attributes:
        shape: its shape. Axes along which JAX repeats it are still of length 1, as ONNX's
            operations repeat them themselves.
        dtype: JAX's type of it.
        name: its name, unless it is a constant.
        array: its numbers, if it is a constant.
    """

    shape: Shape
    dtype: np.dtype
    name: str | None = None
    array: np.ndarray | None = None

    @property
    def numbers(self) -> np.ndarray:
        """The numbers of a constant."""
        assert self.array is not None, "asked of constants only"
        return self.array


def constant(array: Any, dtype: Any = None) -> Value:
    """Make a constant."""
    array = np.asarray(array, dtype)
    return Value(array.shape, array.dtype, array=array)


def axes_of(numbers: Iterable[Any]) -> Value:
    """Make a constant of ONNX's type for axes and places."""
    return constant(list(numbers), np.int64)


class Graph:
    """Nodes in the order in which they run, and the constants that they read."""

    def __init__(self, batch: Any):
        """Begin an empty graph.

        Args:
            batch: pictures at once, a number or JAX's symbol for any number.
        """
        self.batch = batch
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._names: Counter[str] = Counter()
        self._known: dict[Any, str] = {}
        self._made: dict[Any, list[Value]] = {}
        self._unshaped: dict[str, Value] = {}

    def input(self, name: str, shape: Shape, dtype: Any) -> Value:
        """Declare an input, whose first axis is the batch."""
        value = Value(shape, np.dtype(dtype), name)
        if not self.nodes and not isinstance(self.batch, int):
            self.nodes.append(helper.make_node("Shape", [name], ["batch"], start=0, end=1))
        return value

    def node(
        self, operation: str, *inputs: Value, shape: Shape, dtype: Any, **attributes: Any
    ) -> Value:
        """Add a node of one output.

        Args:
            operation: ONNX's name.
            *inputs: what it reads.
            shape: of its output.
            dtype: of its output, JAX's type.
            **attributes: ONNX's.
        """
        return self.several(operation, inputs, ((shape, dtype),), **attributes)[0]

    def several(
        self,
        operation: str,
        inputs: Sequence[Value],
        outputs: Sequence[tuple[Shape, Any]],
        **attributes: Any,
    ) -> list[Value]:
        """Add a node of several outputs, each given by its shape and type, or find its like."""
        read = [self.read(each) for each in inputs]
        same = (operation, *read, str(attributes))
        if same not in self._made:
            names = [self._name(operation) for _ in outputs]
            self.nodes.append(helper.make_node(operation, read, names, names[0], **attributes))
            self._made[same] = [
                Value(shape, np.dtype(dtype), name)
                for (shape, dtype), name in zip(outputs, names, strict=True)
            ]
        return self._made[same]

    def read(self, value: Value) -> str:
        """Name a value; a constant is stored when it is first read."""
        if value.name is not None:
            return value.name
        array = np.ascontiguousarray(value.numbers).reshape(value.shape)
        key = (array.dtype, array.shape, hashlib.sha256(array.data).digest())
        if key not in self._known:
            self._known[key] = self._name("constant")
            self.constants[self._known[key]] = array
        return self._known[key]

    def finish(self, result: Value, name: str) -> None:
        """Name the graph's output, and leave out what it does not need."""
        self.nodes.append(helper.make_node("Identity", [self.read(result)], [name], name))
        self.nodes = _alive(self.nodes, name)
        read = {each for node in self.nodes for each in node.input}
        self.constants = {name: array for name, array in self.constants.items() if name in read}

    def _name(self, kind: str) -> str:
        self._names[kind] += 1
        return f"{kind}_{self._names[kind]}"

    def reshape(self, value: Value, shape: Shape) -> Value:
        """Give a value another shape of as many entries."""
        value = self._unshaped.get(value.name or "", value)
        if value.shape == shape:
            return value
        if value.array is not None and is_known(shape):
            return constant(value.array.reshape(shape))
        sizes = [each if isinstance(each, int) else -1 for each in shape]
        if sizes.count(-1) > 1:
            raise InputError(f"ONNX cannot reshape to {shape}; give --batch N")
        kind = {"shape": shape, "dtype": value.dtype}
        shaped = self.node("Reshape", value, constant(sizes, np.int64), **kind)
        self._unshaped[self.read(shaped)] = value
        return shaped

    def transpose(self, value: Value, order: Sequence[int]) -> Value:
        """Change the order of axes."""
        order = list(order)
        if order == sorted(order):
            return value
        if value.array is not None:
            return constant(value.array.transpose(order))
        shape = tuple(value.shape[axis] for axis in order)
        return self.node("Transpose", value, shape=shape, dtype=value.dtype, perm=order)

    def expand(self, value: Value, shape: Shape) -> Value:
        """Repeat a value along axes of length 1, up to a shape of as many axes."""
        if value.shape == shape:
            return value
        if value.array is not None and is_known(shape):
            return constant(np.broadcast_to(value.array, shape))
        # Along the other axes 1 keeps what is there.
        grown = [1 if old == new else new for old, new in zip(value.shape, shape, strict=True)]
        return self.node("Expand", value, self._sizes(grown), shape=shape, dtype=value.dtype)

    def _sizes(self, shape: Sequence[Any]) -> Value:
        """Make a vector of sizes, some of which are known when the graph runs."""
        if is_known(shape):
            return constant(shape, np.int64)
        parts = [self.size(each) for each in shape]
        return self.node("Concat", *parts, axis=0, shape=(len(shape),), dtype=np.int64)

    def size(self, size: Any) -> Value:
        """Make a vector of one size, which may be known only when the graph runs."""
        if isinstance(size, int):
            return constant([size], np.int64)
        times = size // self.batch
        if not isinstance(times, int) or times * self.batch != size:
            raise InputError(f"ONNX cannot repeat an array {size} times; give --batch N")
        kind = {"shape": (1,), "dtype": np.dtype(np.int64)}
        batch = Value(name="batch", **kind)
        return batch if times == 1 else self.node("Mul", batch, constant([times], np.int64), **kind)

    def cast(self, value: Value, dtype: Any) -> Value:
        """Convert to another type."""
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        if value.array is not None:
            return constant(value.array.astype(dtype))
        to = helper.np_dtype_to_tensor_dtype(dtype)
        return self.node("Cast", value, shape=value.shape, dtype=dtype, to=to)


def is_known(shape: Sequence[Any]) -> bool:
    """Tell whether a shape consists of numbers alone."""
    return all(isinstance(size, int) for size in shape)


def _alive(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """Leave out nodes whose results nobody reads."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]
