"""JAX's operations as ONNX's: a traced program (a jaxpr) becomes a graph.

One rule an operation, listed in `RULES`. What consists of constants alone is computed at once, so
that weights arrive in the shape that products want and no index is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from hvit_jax.errors import InputError
from hvit_jax.exporting.graph import Graph, Shape, Value, constant

Rule = Callable[[Graph, Any, Sequence[Value]], Any]

# Element by element, with axes of length 1 repeated.
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
REDUCED = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
# Those that only say how, not what.
INNER = {"jit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr"}
PASSED = ("copy", "copy_p", "optimization_barrier", "stop_gradient")


def translate(graph: Graph, program: core.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    """Add a program's operations to a graph.

    Args:
        graph: the graph.
        program: the program.
        inputs: what it is called with.

    Returns:
        Its outputs.

    Raises:
        InputError: for an operation that has no rule, or is used in a way that its rule lacks.
    """
    found = dict(zip(program.jaxpr.invars, inputs, strict=True))
    found |= dict(zip(program.jaxpr.constvars, map(constant, program.consts), strict=True))

    def value(variable) -> Value:
        if isinstance(variable, core.Literal):
            return constant(variable.val, variable.aval.dtype)
        return found[variable]

    for equation in program.jaxpr.eqns:
        results = _apply(graph, equation, [value(each) for each in equation.invars])
        found |= dict(zip(equation.outvars, results, strict=True))
    return [value(each) for each in program.jaxpr.outvars]


def _apply(graph: Graph, equation, inputs: Sequence[Value]) -> Sequence[Value]:
    name = equation.primitive.name
    if name in PASSED:
        return inputs
    if name in INNER:
        inner = equation.params[INNER[name]]
        closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
        return translate(graph, closed, inputs)
    if name not in LAZY:
        inputs = [
            graph.expand(each, variable.aval.shape)
            for each, variable in zip(inputs, equation.invars, strict=True)
        ]
        if all(each.array is not None for each in inputs):
            return _compute(equation, [each.numbers for each in inputs])
    rule = RULES.get(name)
    if rule is None:
        raise InputError(f"the ONNX exporter does not know JAX's operation {name!r}")
    results = rule(graph, equation, inputs)
    return [results] if isinstance(results, Value) else results


def _compute(equation, arrays: Sequence[np.ndarray]) -> list[Value]:
    """Compute an operation of constants."""
    results = equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params)
    return [
        constant(each) for each in (results if equation.primitive.multiple_results else [results])
    ]


def _out(equation, index: int = 0) -> dict[str, Any]:
    """Give shape and type of what an equation computes."""
    kind = equation.outvars[index].aval
    return {"shape": kind.shape, "dtype": kind.dtype}


def _axes(axes) -> Value:
    return constant(list(axes), np.int64)


def _elementwise(rule: Rule) -> Rule:
    """Repeat nothing ahead, and compute what consists of constants alone."""

    def run(graph, equation, inputs):
        shape = _together([each.shape for each in inputs])
        if all(each.array is not None for each in inputs):
            arrays = [np.broadcast_to(each.numbers, shape) for each in inputs]
            return _compute(equation, arrays)
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
    return graph.node("Concat", *inputs, axis=equation.params["dimension"], **_out(equation))


def _stack(graph, equation, inputs):
    axis = equation.params["axis"]
    parts = [graph.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:])) for x in inputs]
    return graph.node("Concat", *parts, axis=axis, **_out(equation))


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
        "Slice", inputs[0], *map(_axes, (starts, ends, axes, steps)), **_out(equation)
    )


def _split(graph, equation, inputs):
    outputs = [(each.aval.shape, each.aval.dtype) for each in equation.outvars]
    read = (inputs[0], _axes(equation.params["sizes"]))
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
        _axes((*low, *high)),
        filling,
        shape=_out(equation)["shape"],
        dtype=value.dtype,
    )
    return graph.cast(padded, inputs[0].dtype)


def _reduce(graph, equation, inputs):
    (value,) = inputs
    kind = {**_out(equation), "dtype": value.dtype}
    operation = REDUCED[equation.primitive.name]
    return graph.node(operation, value, _axes(equation.params["axes"]), keepdims=0, **kind)


def _any_or_all(graph, equation, inputs):
    operation = "ReduceMax" if equation.primitive.name == "reduce_or" else "ReduceMin"
    whole = graph.cast(inputs[0], np.int32)
    kind = {**_out(equation), "dtype": np.int32}
    reduced = graph.node(operation, whole, _axes(equation.params["axes"]), keepdims=0, **kind)
    return graph.cast(reduced, np.bool_)


def _argument(graph, equation, inputs):
    """Find the first of the largest, or smallest."""
    operation = "ArgMax" if equation.primitive.name == "argmax" else "ArgMin"
    (axis,), kind = equation.params["axes"], {**_out(equation), "dtype": np.int64}
    (value,) = inputs
    if value.dtype == np.bool_:
        value = graph.cast(value, np.int32)
    found = graph.node(operation, value, axis=axis, keepdims=0, **kind)
    return graph.cast(found, equation.params["index_dtype"])


def _cumulative_sum(graph, equation, inputs):
    params = equation.params
    axis = constant(params["axis"], np.int64)
    return graph.node("CumSum", inputs[0], axis, reverse=int(params["reverse"]), **_out(equation))


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
    summed = _size(right.shape[len(batch) : len(batch) + len(right_sum)])
    # Rows may have several axes where there is no batch: a product with weights.
    lead = row_sizes if not batch and row_sizes else (*batch, _size(row_sizes))
    left = graph.reshape(left, (*lead, summed))
    right = graph.reshape(right, (*batch, summed, _size(column_sizes)))
    kind = {"shape": (*lead, _size(column_sizes)), "dtype": left.dtype}
    product = graph.reshape(graph.node("MatMul", left, right, **kind), out.shape)
    return graph.cast(product, out.dtype)


def _size(sizes: Sequence[Any]) -> Any:
    total = 1
    for size in sizes:
        total = total * size
    return total


def _gather(graph, equation, inputs):
    """Take entries along one axis, whole along the others, each batch entry its own."""
    (value, index), params = inputs, equation.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if index.array is not None and len(index.shape) == 1:
        return _cut(graph, equation, value, numbers.start_index_map, index.array.tolist())
    batch, index_batch = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    whole = [
        axis for axis in range(len(value.shape)) if axis not in (*batch, *numbers.start_index_map)
    ]
    known = len(numbers.start_index_map) == 1 == index.shape[-1]
    if (
        not known
        or numbers.collapsed_slice_dims != numbers.start_index_map
        or any(sizes[axis] != value.shape[axis] for axis in whole)
    ):
        raise InputError("the ONNX exporter takes entries along one axis only")
    (axis,) = numbers.start_index_map
    index = _in_range(graph, params["mode"], index, value.shape[axis])
    places = [a for a in range(len(index.shape) - 1) if a not in index_batch]
    index = graph.transpose(index, (*index_batch, *places, len(index.shape) - 1))
    value = graph.transpose(value, (*batch, axis, *whole))
    index = graph.cast(index, np.int64)
    lead, rest = index.shape[:-1], value.shape[len(batch) + 1 :]
    kind = {"shape": (*lead, *rest), "dtype": value.dtype}
    taken = graph.node("GatherND", value, index, batch_dims=len(batch), **kind)
    # Axes of the index come in their own order, between those that were taken whole.
    came = iter(np.argsort((*index_batch, *places)))
    after = iter(range(len(lead), len(lead) + len(rest)))
    rank = len(lead) + len(rest)
    order = [int(next(after if axis in numbers.offset_dims else came)) for axis in range(rank)]
    return graph.transpose(taken, order)


def _cut(graph, equation, value, axes, starts):
    """Take one piece at a known place, as JAX does where the batch is not known."""
    sizes = equation.params["slice_sizes"]
    ends = [start + sizes[axis] for axis, start in zip(axes, starts, strict=True)]
    lengths = [value.shape[axis] for axis in axes]
    if min(starts) < 0 or any(end > most for end, most in zip(ends, lengths, strict=True)):
        raise InputError("the ONNX exporter takes pieces inside an array only")
    kind = {"shape": sizes, "dtype": value.dtype}
    piece = graph.node("Slice", value, *map(_axes, (starts, ends, axes)), **kind)
    return graph.reshape(piece, equation.outvars[0].aval.shape)


def _in_range(graph, mode, index, length):
    """Do as JAX does with indices that are out of range."""
    name = jax.lax.GatherScatterMode.from_any(mode).name
    if name == "PROMISE_IN_BOUNDS":
        return index
    if name == "CLIP":
        kind = {"shape": index.shape, "dtype": index.dtype}
        low, high = (constant(limit, index.dtype) for limit in (0, length - 1))
        return graph.node("Min", graph.node("Max", index, low, **kind), high, **kind)
    inside = index.array is not None and 0 <= index.array.min() <= index.array.max() < length
    if inside:
        return index
    raise InputError("the ONNX exporter needs indices that are promised to be in range")


def _scatter(graph, equation, inputs):
    """Write entries along one axis, each place once: no order of writing is asked for."""
    (value, index, new), params = inputs, equation.params
    numbers = params["dimension_numbers"]
    (axis,) = numbers.scatter_dims_to_operand_dims
    batch, window = numbers.operand_batching_dims, numbers.update_window_dims
    rank = len(value.shape)
    simple = (
        params["unique_indices"]
        and numbers.inserted_window_dims == (axis,)
        and batch == numbers.scatter_indices_batching_dims == tuple(range(axis))
        and window == tuple(range(axis + 1, rank))
        and new.shape[axis + 1 :] == value.shape[axis + 1 :]
    )
    if not simple:
        raise InputError("the ONNX exporter writes to different places along one axis only")
    index = graph.cast(graph.reshape(index, index.shape[:-1]), np.int64)
    count, length = index.shape[axis], value.shape[axis]
    places = constant(np.arange(count).reshape(*(1,) * axis, count), np.int64)
    total = length
    if jax.lax.GatherScatterMode.from_any(params["mode"]).name != "PROMISE_IN_BOUNDS":
        # What is out of range goes behind the end, to a place of its own, and is cut off.
        outside = graph.node(
            "GreaterOrEqual", index, constant(length, np.int64), shape=index.shape, dtype=np.bool_
        )
        away = constant(length + places.numbers)
        index = graph.node("Where", outside, away, index, shape=index.shape, dtype=np.int64)
        total = length + count
    lead = value.shape[:axis]
    # First where each entry comes from: an old one, or a new one behind them.
    old = graph.expand(constant(np.arange(total).reshape(*(1,) * axis, total)), (*lead, total))
    fresh = graph.expand(constant(length + places.numbers), index.shape)
    kind = {"shape": (*lead, total), "dtype": np.int64}
    source = graph.node("ScatterElements", old, index, fresh, axis=axis, **kind)
    if total > length:
        source = graph.node(
            "Slice",
            source,
            *map(_axes, ([0], [length], [axis])),
            shape=(*lead, length),
            dtype=np.int64,
        )
    both = (*lead, length + count, *value.shape[axis + 1 :])
    joined = graph.node("Concat", value, new, axis=axis, shape=both, dtype=value.dtype)
    source = graph.reshape(source, (*lead, length, 1))
    return graph.node("GatherND", joined, source, batch_dims=len(batch), **_out(equation))


def _sort(graph, equation, inputs):
    """Sort rows by one key; some runtimes change the order of equal ones, against the standard."""
    params, shape = equation.params, equation.outvars[0].aval.shape
    if params["num_keys"] != 1 or params["is_stable"]:
        raise InputError("the ONNX exporter sorts by one key only, and keeps no order of ties")
    (key, *rows), axis = inputs, params["dimension"]
    read = (graph.expand(key, shape), constant([shape[axis]], np.int64))
    outputs = ((shape, key.dtype), (shape, np.int64))
    ordered, places = graph.several("TopK", read, outputs, axis=axis, largest=0)
    return [ordered, *(_reordered(graph, row, places, axis) for row in rows)]


def _reordered(graph, row, places, axis):
    count = np.arange(places.shape[axis])
    if row.array is not None and np.array_equal(row.array.ravel(), count):
        return graph.cast(places, row.dtype)
    row = graph.expand(row, places.shape)
    kind = {"shape": row.shape, "dtype": row.dtype}
    return graph.node("GatherElements", row, places, axis=axis, **kind)


def _top_k(graph, equation, inputs):
    count = constant([equation.params["k"]], np.int64)
    values, places = equation.outvars
    outputs = ((values.aval.shape, values.aval.dtype), (places.aval.shape, np.int64))
    best, which = graph.several("TopK", (inputs[0], count), outputs, axis=-1)
    return [best, graph.cast(which, places.aval.dtype)]


def _scan(graph, equation, inputs):
    """Write out a loop of known length."""
    params = equation.params
    fixed, carried, length = params["num_consts"], params["num_carry"], params["length"]
    if not isinstance(length, int):
        raise InputError("the ONNX exporter writes out loops of known length only; give --batch N")
    consts, carry = list(inputs[:fixed]), list(inputs[fixed : fixed + carried])
    rows = [
        graph.expand(row, variable.aval.shape)
        for row, variable in zip(inputs, equation.invars, strict=True)
    ][fixed + carried :]
    steps, collected = range(length), {}
    for step in reversed(steps) if params["reverse"] else steps:
        entries = [_entry(graph, row, step) for row in rows]
        results = translate(graph, params["jaxpr"], [*consts, *carry, *entries])
        carry, collected[step] = results[:carried], results[carried:]
    stacks = []
    for index, variable in enumerate(equation.outvars[carried:]):
        (_, *shape), dtype = variable.aval.shape, variable.aval.dtype
        each = [graph.expand(collected[step][index], tuple(shape)) for step in steps]
        each = [graph.reshape(part, (1, *shape)) for part in each]
        stacks.append(graph.node("Concat", *each, axis=0, shape=(length, *shape), dtype=dtype))
    return [*carry, *stacks]


def _entry(graph, row, step):
    if row.array is not None:
        return constant(row.array[step])
    kind = {"shape": row.shape[1:], "dtype": row.dtype}
    return graph.node("Gather", row, constant(step, np.int64), axis=0, **kind)


def _composite(graph, equation, inputs):
    """Translate what other runtimes have one operation for; see `hvit_jax.ops.platform`."""
    params = equation.params
    options = {name: leaves[0] for name, leaves, _ in params["attributes"]}
    operation, attributes = SINGLE.get(params["name"], lambda: (None, {}))(**options)
    if operation is None:
        return translate(graph, params["jaxpr"], inputs)
    inputs = [
        graph.expand(each, variable.aval.shape)
        for each, variable in zip(inputs, equation.invars, strict=True)
    ]
    return graph.node(operation, *inputs, **attributes, **_out(equation))


SINGLE = {
    "gelu": lambda: ("Gelu", {"approximate": "none"}),
    "layer_norm": lambda epsilon: ("LayerNormalization", {"axis": -1, "epsilon": epsilon}),
    "softmax": lambda: ("Softmax", {"axis": -1}),
    "tanh_gelu": lambda: ("Gelu", {"approximate": "tanh"}),
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(LOGICAL, _logical),
    "ne": _differs,
    "square": _square,
    "integer_pow": _integer_pow,
    "rsqrt": _rsqrt,
    "rem": _remainder,
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "iota": _iota,
    "dim_as_value": _batch_size,
    "sort": _sort,
    "scan": _scan,
    "composite": _composite,
}
# Those above take axes of length 1 that stand for longer ones; those below do not.
LAZY = frozenset(RULES)
RULES |= {
    **dict.fromkeys(REDUCED, _reduce),
    "argmax": _argument,
    "argmin": _argument,
    "concatenate": _concatenate,
    "cumsum": _cumulative_sum,
    "dot_general": _product,
    "gather": _gather,
    "pad": _pad,
    "reduce_and": _any_or_all,
    "reduce_or": _any_or_all,
    "reshape": _reshape,
    "scatter": _scatter,
    "slice": _slice,
    "split": _split,
    "stack": _stack,
    "top_k": _top_k,
}
