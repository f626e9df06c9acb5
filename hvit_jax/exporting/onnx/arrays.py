"""Operations on whole arrays: shapes, sums and products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from hvit_jax.errors import InputError
from hvit_jax.exporting.onnx.equations import Rule, out_kind
from hvit_jax.exporting.onnx.graph import axes_of, constant

REDUCED = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}


def _broadcast(graph, equation, inputs):
    """Put axes of length 1 in; what reads them repeats them, or asks for it."""
    (value, *_), params = inputs, equation.params
    shape: list[Any] = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], value.shape, strict=True):
        shape[axis] = size
    return graph.reshape(value, tuple(shape))


def _reshape(graph, equation, inputs):
    return graph.reshape(inputs[0], equation.outvars[0].aval.shape)


def _transpose(graph, equation, inputs):
    return graph.transpose(inputs[0], equation.params["permutation"])


def _squeeze(graph, equation, inputs):
    (value,), axes = inputs, equation.params["dimensions"]
    shape = tuple(size for axis, size in enumerate(value.shape) if axis not in axes)
    return graph.reshape(value, shape)


def _iota(graph, equation, inputs):
    """Count along one axis; the others are repeated by what reads it."""
    shape, axis = equation.params["shape"], equation.params["dimension"]
    if not isinstance(shape[axis], int):
        raise InputError("the ONNX exporter cannot count up to the batch size; give --batch N")
    counted = np.arange(shape[axis]).astype(equation.params["dtype"])
    return constant(counted.reshape([-1 if place == axis else 1 for place in range(len(shape))]))


def _batch_size(graph, equation, inputs):
    """Ask for the batch size, or a multiple of it."""
    size = graph.reshape(graph.size(equation.params["dim"]), ())
    return graph.cast(size, equation.outvars[0].aval.dtype)


def _concatenate(graph, equation, inputs):
    axis = equation.params["dimension"]
    inputs = [each for each in inputs if each.shape[axis] != 0]
    return graph.node("Concat", *inputs, axis=axis, **out_kind(equation))


def _stack(graph, equation, inputs):
    axis = equation.params["axis"]
    parts = [graph.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:])) for x in inputs]
    return graph.node("Concat", *parts, axis=axis, **out_kind(equation))


def _slice(graph, equation, inputs):
    params, shape = equation.params, inputs[0].shape
    steps = params["strides"] or (1,) * len(shape)
    cut = [
        (axis, *bounds)
        for axis, bounds in enumerate(
            zip(params["start_indices"], params["limit_indices"], steps, strict=True)
        )
        if bounds != (0, shape[axis], 1)
    ]
    if not cut:
        return inputs[0]
    axes, starts, ends, steps = zip(*cut, strict=True)
    return graph.node(
        "Slice", inputs[0], *map(axes_of, (starts, ends, axes, steps)), **out_kind(equation)
    )


def _split(graph, equation, inputs):
    outputs = [(each.aval.shape, each.aval.dtype) for each in equation.outvars]
    read = (inputs[0], axes_of(equation.params["sizes"]))
    return graph.several("Split", read, outputs, axis=equation.params["axis"])


def _pad(graph, equation, inputs):
    low, high, inner = zip(*equation.params["padding_config"], strict=True)
    if any(inner):
        raise InputError("the ONNX exporter does not pad between entries")
    value, filling = inputs
    if value.dtype == np.bool_:  # ONNX Runtime pads numbers only.
        value, filling = (graph.cast(each, np.int32) for each in inputs)
    padded = graph.node(
        "Pad",
        value,
        axes_of((*low, *high)),
        filling,
        shape=out_kind(equation)["shape"],
        dtype=value.dtype,
    )
    return graph.cast(padded, inputs[0].dtype)


def _reduce(graph, equation, inputs):
    (value,) = inputs
    kind = {**out_kind(equation), "dtype": value.dtype}
    operation = REDUCED[equation.primitive.name]
    return graph.node(operation, value, axes_of(equation.params["axes"]), keepdims=0, **kind)


def _any_or_all(graph, equation, inputs):
    operation = "ReduceMax" if equation.primitive.name == "reduce_or" else "ReduceMin"
    whole = graph.cast(inputs[0], np.int32)
    kind = {**out_kind(equation), "dtype": np.int32}
    reduced = graph.node(operation, whole, axes_of(equation.params["axes"]), keepdims=0, **kind)
    return graph.cast(reduced, np.bool_)


def _argument(graph, equation, inputs):
    """Find the first of the largest, or smallest."""
    operation = "ArgMax" if equation.primitive.name == "argmax" else "ArgMin"
    (axis,), kind = equation.params["axes"], {**out_kind(equation), "dtype": np.int64}
    (value,) = inputs
    if value.dtype == np.bool_:
        value = graph.cast(value, np.int32)
    found = graph.node(operation, value, axis=axis, keepdims=0, **kind)
    return graph.cast(found, equation.params["index_dtype"])


def _cumulative_sum(graph, equation, inputs):
    params = equation.params
    axis = constant(params["axis"], np.int64)
    return graph.node(
        "CumSum", inputs[0], axis, reverse=int(params["reverse"]), **out_kind(equation)
    )


def _product(graph, equation, inputs):
    """Multiply matrices: batch axes first, then rows, then what is summed over."""
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    out, (left, right) = equation.outvars[0].aval, inputs
    batch = tuple(left.shape[axis] for axis in left_batch)
    rows = [axis for axis in range(len(left.shape)) if axis not in (*left_batch, *left_sum)]
    columns = [axis for axis in range(len(right.shape)) if axis not in (*right_batch, *right_sum)]
    left = graph.transpose(left, (*left_batch, *rows, *left_sum))
    right = graph.transpose(right, (*right_batch, *right_sum, *columns))
    row_sizes = left.shape[len(batch) : len(batch) + len(rows)]
    column_sizes = right.shape[len(batch) + len(right_sum) :]
    summed = math.prod(right.shape[len(batch) : len(batch) + len(right_sum)])
    # Rows may have several axes where there is no batch: a product with weights.
    lead = row_sizes if not batch and row_sizes else (*batch, math.prod(row_sizes))
    left = graph.reshape(left, (*lead, summed))
    right = graph.reshape(right, (*batch, summed, math.prod(column_sizes)))
    kind = {"shape": (*lead, math.prod(column_sizes)), "dtype": left.dtype}
    product = graph.reshape(graph.node("MatMul", left, right, **kind), out.shape)
    return graph.cast(product, out.dtype)


def _convolution(graph, equation, inputs):
    """Convolve; ONNX has channels before places."""
    params, out = equation.params, equation.outvars[0].aval
    numbers, (value, kernel) = params["dimension_numbers"], inputs
    if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        raise InputError("the ONNX exporter knows no convolutions that enlarge")
    convolved = graph.node(
        "Conv",
        graph.transpose(value, numbers.lhs_spec),
        graph.transpose(kernel, numbers.rhs_spec),
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
        pads=[side for sides in zip(*params["padding"], strict=True) for side in sides],
        strides=params["window_strides"],
        shape=tuple(out.shape[axis] for axis in numbers.out_spec),
        dtype=out.dtype,
    )
    return graph.transpose(convolved, np.argsort(numbers.out_spec).tolist())


# These take axes of length 1 that stand for longer ones; those below do not.
LAZY_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "dim_as_value": _batch_size,
    "iota": _iota,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(REDUCED, _reduce),
    "argmax": _argument,
    "argmin": _argument,
    "concatenate": _concatenate,
    "conv_general_dilated": _convolution,
    "cumsum": _cumulative_sum,
    "dot_general": _product,
    "pad": _pad,
    "reduce_and": _any_or_all,
    "reduce_or": _any_or_all,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "stack": _stack,
}
