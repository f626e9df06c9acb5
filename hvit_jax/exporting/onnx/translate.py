"""JAX's operations as ONNX's: a traced program (a jaxpr) becomes a graph.

One rule an operation; loops of known length are written out. What consists of constants alone is
computed at once, so that weights arrive in the shape that products want.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from hvit_jax.errors import InputError
from hvit_jax.exporting.onnx import arrays, elementwise, indexing
from hvit_jax.exporting.onnx.equations import Rule, compute, expanded, out_kind
from hvit_jax.exporting.onnx.graph import Graph, Value, constant

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
        kind: Any = variable.aval
        if isinstance(variable, core.Literal):
            return constant(variable.val, kind.dtype)
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
        inputs = expanded(graph, equation, inputs)
        if all(each.array is not None for each in inputs):
            return compute(equation, [each.numbers for each in inputs])
    rule = RULES.get(name)
    if rule is None:
        raise InputError(f"the ONNX exporter does not know JAX's operation {name!r}")
    results = rule(graph, equation, inputs)
    return [results] if isinstance(results, Value) else results


def _scan(graph, equation, inputs):
    """Write out a loop of known length."""
    params = equation.params
    fixed, carried, length = params["num_consts"], params["num_carry"], params["length"]
    if not isinstance(length, int):
        raise InputError("the ONNX exporter writes out loops of known length only; give --batch N")
    consts, carry = list(inputs[:fixed]), list(inputs[fixed : fixed + carried])
    rows = expanded(graph, equation, inputs)[fixed + carried :]
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
    operation, attributes = SINGLE[params["name"]](**options)
    inputs = expanded(graph, equation, inputs)
    return graph.node(operation, *inputs, **attributes, **out_kind(equation))


SINGLE: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "gelu": lambda: ("Gelu", {"approximate": "none"}),
    "layer_norm": lambda epsilon: ("LayerNormalization", {"axis": -1, "epsilon": epsilon}),
    "softmax": lambda: ("Softmax", {"axis": -1}),
    "tanh_gelu": lambda: ("Gelu", {"approximate": "tanh"}),
}
LAZY = {
    **elementwise.RULES,
    **arrays.LAZY_RULES,
    **indexing.LAZY_RULES,
    "composite": _composite,
    "scan": _scan,
}
RULES: dict[str, Rule] = {**LAZY, **arrays.RULES, **indexing.RULES}
