"""Operations of one element at a time; axes of length 1 are repeated by ONNX itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hvit_jax.errors import InputError
from hvit_jax.exporting.onnx.equations import Rule, compute
from hvit_jax.exporting.onnx.graph import Shape, Value, constant

# Those that ONNX has as JAX does.
SAME = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
LOGICAL = {"and": "And", "not": "Not", "or": "Or", "xor": "Xor"}


def _elementwise(rule: Callable[..., Value]) -> Rule:
    """Repeat nothing ahead, and compute what consists of constants alone."""

    def run(graph, equation, inputs):
        shape = _together([each.shape for each in inputs])
        if all(each.array is not None for each in inputs):
            arrays = [np.broadcast_to(each.numbers, shape) for each in inputs]
            return compute(equation, arrays)
        return rule(graph, equation, inputs, shape)

    return run


def _together(shapes: Sequence[Shape]) -> Shape:
    """Find the shape that arrays have when axes of length 1 are repeated; scalars have no axes."""
    rank = max(map(len, shapes))
    full = [shape for shape in shapes if len(shape) == rank]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*full, strict=True))


@_elementwise
def _same(graph, equation, inputs, shape):
    dtype = equation.outvars[0].aval.dtype
    return graph.node(SAME[equation.primitive.name], *inputs, shape=shape, dtype=dtype)


@_elementwise
def _logical(graph, equation, inputs, shape):
    if inputs[0].dtype != np.bool_:
        raise InputError(f"the ONNX exporter knows {equation.primitive.name!r} of truths only")
    return graph.node(LOGICAL[equation.primitive.name], *inputs, shape=shape, dtype=np.bool_)


@_elementwise
def _differs(graph, equation, inputs, shape):
    kind = {"shape": shape, "dtype": np.bool_}
    if inputs[0].dtype == np.bool_:
        return graph.node("Xor", *inputs, **kind)
    return graph.node("Not", graph.node("Equal", *inputs, **kind), **kind)


@_elementwise
def _square(graph, equation, inputs, shape):
    return graph.node("Mul", *inputs, *inputs, shape=shape, dtype=inputs[0].dtype)


@_elementwise
def _integer_pow(graph, equation, inputs, shape):
    power = constant(equation.params["y"], inputs[0].dtype)
    return graph.node("Pow", *inputs, power, shape=shape, dtype=inputs[0].dtype)


@_elementwise
def _rsqrt(graph, equation, inputs, shape):
    kind = {"shape": shape, "dtype": inputs[0].dtype}
    return graph.node("Reciprocal", graph.node("Sqrt", *inputs, **kind), **kind)


@_elementwise
def _remainder(graph, equation, inputs, shape):
    """Take the remainder of the dividend's sign, as in C."""
    return graph.node("Mod", *inputs, shape=shape, dtype=inputs[0].dtype, fmod=1)


@_elementwise
def _select(graph, equation, inputs, shape):
    which, no, *yes = inputs
    if which.dtype != np.bool_:
        raise InputError("the ONNX exporter selects by truths only")
    return graph.node("Where", which, *yes, no, shape=shape, dtype=no.dtype)


@_elementwise
def _clamp(graph, equation, inputs, shape):
    low, value, high = inputs
    kind = {"shape": shape, "dtype": value.dtype}
    return graph.node("Min", graph.node("Max", value, low, **kind), high, **kind)


@_elementwise
def _convert(graph, equation, inputs, shape):
    return graph.cast(*inputs, equation.params["new_dtype"])


RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(LOGICAL, _logical),
    "clamp": _clamp,
    "convert_element_type": _convert,
    "integer_pow": _integer_pow,
    "ne": _differs,
    "rem": _remainder,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "square": _square,
}
