"""What the rules ask of an equation of a traced program (a jaxpr)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from hvit_jax.exporting.onnx.graph import Graph, Value, constant

# Adds an equation's operation to a graph, and gives its results.
Rule = Callable[[Graph, Any, Sequence[Value]], Value | Sequence[Value]]


def out_kind(equation: Any) -> dict[str, Any]:
    """Give shape and type of the first array that an equation computes."""
    kind = equation.outvars[0].aval
    return {"shape": kind.shape, "dtype": kind.dtype}


def compute(equation: Any, arrays: Sequence[np.ndarray]) -> list[Value]:
    """Compute an equation of constants."""
    results = equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params)
    return [constant(x) for x in (results if equation.primitive.multiple_results else [results])]


def expanded(graph: Graph, equation: Any, inputs: Sequence[Value]) -> list[Value]:
    """Repeat the axes of length 1 that stand for longer ones."""
    pairs = zip(inputs, equation.invars, strict=True)
    return [graph.expand(each, variable.aval.shape) for each, variable in pairs]
