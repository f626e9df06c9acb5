"""Options of a method: dataclass fields with a help text, checked against their types."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any, TypeVar

from hvit_jax.errors import InputError

Value = TypeVar("Value")


def option(default: Any, help: str, *, short: str | None = None, choices: tuple = ()) -> Any:
    """Declare a method's option: a dataclass field that command lines and documents read.

    Args:
        default: its default; None stands for a value that depends on the model's size.
        help: one line for `--help`.
        short: a one-letter flag such as "-l".
        choices: the only values that are accepted, if limited.
    """
    metadata = {"help": help, "short": short, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def known(value: Value | None) -> Value:
    """Read an option whose default depends on the model.

    Raises:
        InputError: if the method has not been resolved, so that the value is not known.
    """
    if value is None:
        raise InputError("this option depends on the model's size; call resolve(config) first")
    return value


def checked_values(reducer: Any) -> dict[str, Any]:
    """Check a method's options against their fields' choices and types.

    Args:
        reducer: a method, a dataclass with `option` fields and a name.

    Returns:
        The values by field; lists have become tuples, so that the method stays hashable.

    Raises:
        InputError: for a value that its field does not accept.
    """
    hints, values = typing.get_type_hints(type(reducer)), {}
    for field in dataclasses.fields(reducer):
        value = getattr(reducer, field.name)
        value = values[field.name] = tuple(value) if isinstance(value, list) else value
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            allowed = ", ".join(map(str, choices))
            raise InputError(f"{reducer.name}: {field.name} must be one of {allowed}: {value!r}")
        if not matches(value, hints[field.name]):
            wanted = describe(hints[field.name])
            raise InputError(f"{reducer.name}: {field.name} must be {wanted}, got {value!r}")
    return values


def matches(value: Any, hint: Any) -> bool:
    """Tell whether an option's value has its field's type; ints count as floats, not bools."""
    if isinstance(hint, types.UnionType):
        return any(matches(value, part) for part in hint.__args__)
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(matches(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(matches, value, parts))
    if hint in (int, float):
        number = isinstance(value, (int, hint)) and not isinstance(value, bool)
        return number and (hint is int or abs(value) <= sys.float_info.max)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """Say in words which values a field's type accepts."""
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(part) for part in hint.__args__ if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if parts[-1] is not Ellipsis and len(set(parts)) > 1:
            return f"({', '.join(map(describe, parts))})"
        count = "a list of" if parts[-1] is Ellipsis else str(len(parts))
        return f"{count} {describe(parts[0]).removeprefix('a ')}s"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names[hint]


def steps(count: int = 40) -> tuple[float, ...]:
    """Cut the range from 0 to 1 into equal steps, without 0: values that a strength may take."""
    return tuple(step / count for step in range(1, count + 1))
