"""Operations by index: entries taken, written and sorted."""

from __future__ import annotations

import jax
import numpy as np

from hvit_jax.errors import InputError
from hvit_jax.exporting.onnx.equations import Rule, out_kind
from hvit_jax.exporting.onnx.graph import axes_of, constant


def _gather(graph, equation, inputs):
    """Take entries along one axis, and all others whole."""
    (value, index), params = inputs, equation.params
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if index.array is not None and len(index.shape) == 1:
        return _cut(graph, equation, value, numbers.start_index_map, index.array.tolist())
    batch, taken = numbers.operand_batching_dims, numbers.start_index_map
    whole = [axis for axis in range(len(value.shape)) if axis not in (*batch, *taken)]
    if (
        len(taken) != 1
        or numbers.collapsed_slice_dims != taken
        or any(sizes[axis] != value.shape[axis] for axis in whole)
    ):
        raise InputError("the ONNX exporter takes entries along one axis only")
    (axis,) = taken
    index = _in_range(graph, params["mode"], index, value.shape[axis])
    if not batch and numbers.offset_dims[:axis] == tuple(range(axis)) and len(index.shape) == 2:
        return _take(graph, equation, value, index, axis)
    value = graph.transpose(value, (*batch, axis, *whole))
    return _take_each(graph, numbers, value, index)


def _take_each(graph, numbers, value, index):
    """Take each batch entry's own entries: batch axes come first, then the one to take along."""
    batch, last = numbers.start_indices_batching_dims, len(index.shape) - 1
    places = [axis for axis in range(last) if axis not in batch]
    index = graph.cast(graph.transpose(index, (*batch, *places, last)), np.int64)
    lead, rest = index.shape[:-1], value.shape[len(batch) + 1 :]
    kind = {"shape": (*lead, *rest), "dtype": value.dtype}
    found = graph.node("GatherND", value, index, batch_dims=len(batch), **kind)
    # Axes of the index come in their own order, between those that were taken whole.
    came, after = iter(np.argsort((*batch, *places))), iter(range(last, last + len(rest)))
    inside = [axis in numbers.offset_dims for axis in range(last + len(rest))]
    return graph.transpose(found, [int(next(after if each else came)) for each in inside])


def _take(graph, equation, value, index, axis):
    """Take the same entries of all rows; evenly spaced ones are a slice."""
    if index.array is not None:
        numbers = index.array.ravel()
        steps = np.unique(np.diff(numbers))
        if len(steps) == 1 and steps[0] > 0:
            bounds = ([numbers[0]], [numbers[-1] + 1], [axis], steps)
            return graph.node("Slice", value, *map(axes_of, bounds), **out_kind(equation))
    index = graph.reshape(index, index.shape[:-1])
    return graph.node("Gather", value, index, axis=axis, **out_kind(equation))


def _cut(graph, equation, value, axes, starts):
    """Take one piece at a known place, as JAX does where the batch is not known."""
    sizes = equation.params["slice_sizes"]
    ends = [start + sizes[axis] for axis, start in zip(axes, starts, strict=True)]
    lengths = [value.shape[axis] for axis in axes]
    if min(starts) < 0 or any(end > most for end, most in zip(ends, lengths, strict=True)):
        raise InputError("the ONNX exporter takes pieces inside an array only")
    kind = {"shape": sizes, "dtype": value.dtype}
    piece = graph.node("Slice", value, *map(axes_of, (starts, ends, axes)), **kind)
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
    """Write entries along one axis, each place once: no order of writing is asked for.

    First where each entry comes from, an old one or a new one behind them; then all are taken.
    """
    (value, index, new), params = inputs, equation.params
    numbers = params["dimension_numbers"]
    (axis,), window = numbers.scatter_dims_to_operand_dims, numbers.update_window_dims
    batch = numbers.operand_batching_dims
    if not (
        params["unique_indices"]
        and jax.lax.GatherScatterMode.from_any(params["mode"]).name == "PROMISE_IN_BOUNDS"
        and numbers.inserted_window_dims == (axis,)
        and batch == numbers.scatter_indices_batching_dims == tuple(range(axis))
        and window == tuple(range(axis + 1, len(value.shape)))
        and new.shape[axis + 1 :] == value.shape[axis + 1 :]
    ):
        raise InputError("the ONNX exporter writes to different places along one axis only")
    index = graph.cast(graph.reshape(index, index.shape[:-1]), np.int64)
    count, length, lead = index.shape[axis], value.shape[axis], value.shape[:axis]
    places = np.arange(length + count).reshape(*(1,) * axis, -1)
    old = graph.expand(constant(places[..., :length]), (*lead, length))
    fresh = graph.expand(constant(places[..., length:]), index.shape)
    kind = {"shape": old.shape, "dtype": np.int64}
    source = graph.node("ScatterElements", old, index, fresh, axis=axis, **kind)
    both = (*lead, length + count, *value.shape[axis + 1 :])
    joined = graph.node("Concat", value, new, axis=axis, shape=both, dtype=value.dtype)
    source = graph.reshape(source, (*lead, length, 1))
    return graph.node("GatherND", joined, source, batch_dims=len(batch), **out_kind(equation))


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


# Takes axes of length 1 that stand for longer ones; those below do not.
LAZY_RULES: dict[str, Rule] = {"sort": _sort}
RULES: dict[str, Rule] = {"gather": _gather, "scatter": _scatter, "top_k": _top_k}
