"""What the processes of a run tell each other: values, and whether all are about to do the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hvit_jax.errors import InputError


def gather(value: Any) -> list[Any]:
    """Give every process what each of them has.

    Args:
        value: anything that JSON can express; all processes call this at the same point.

    Returns:
        The values in the order of the processes.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size])).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def share(array: np.ndarray) -> np.ndarray:
    """Give every process the array that the first one has; what others pass does not count."""
    if jax.process_count() == 1:
        return array
    shape, kind = gather([array.shape, array.dtype.str])[0]
    first = jax.process_index() == 0
    return np.asarray(
        multihost_utils.broadcast_one_to_all(array if first else np.zeros(shape, kind))
    )


def check_same(text: str, *, gather: Callable[[Any], list[Any]] = gather, **more: Any) -> None:
    """Refuse to go on where another process is about to do something else.

    Args:
        text: what this one does, for people.
        gather: gives every process what each of them has.
        **more: what else has to be the same, such as the content of files that each of them reads.
    """
    mine = json.loads(json.dumps(more))
    for process, (said, other) in enumerate(gather([text, mine])):
        if said != text:
            raise InputError(
                f"process {process} was started with other options: {said}; here: {text}"
            )
        differing = [name for name in mine if other.get(name) != mine[name]]
        if differing:
            raise InputError(f"process {process} has another {', '.join(differing)} than this one")
