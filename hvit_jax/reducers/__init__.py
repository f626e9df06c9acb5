"""The reduction methods, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvit_jax.errors import InputError, unknown
from hvit_jax.fields import show
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.reducers.act import ACT
from hvit_jax.reducers.ats import ATS
from hvit_jax.reducers.budgeted import Budgeted, as_budgeted
from hvit_jax.reducers.evit import EViT
from hvit_jax.reducers.evo import EvoViT
from hvit_jax.reducers.hourglass import Hourglass
from hvit_jax.reducers.smyrf import SMYRF
from hvit_jax.reducers.tome import ToMe

REDUCERS: dict[str, type[Reducer]] = {
    reducer.name: reducer
    for reducer in (
        Reducer,
        Hourglass,
        EViT,
        EvoViT,
        ACT,
        ATS,
        ToMe,
        SMYRF,
    )
}

__all__ = [
    "ACT",
    "ATS",
    "Budgeted",
    "EViT",
    "EvoViT",
    "Hourglass",
    "Layer",
    "REDUCERS",
    "Reducer",
    "SMYRF",
    "ToMe",
    "TokenState",
    "as_budgeted",
    "make_reducer",
    "method_name",
]


def make_reducer(method: str | Reducer, **options: Any) -> Reducer:
    """Build a method from its name and options.

    Args:
        method: a name in `REDUCERS`, or a built method, which takes no further options.
        **options: the fields of the method's dataclass.

    Raises:
        InputError: for an unknown method, an option it does not have, or a value out of range.
    """
    if isinstance(method, Reducer):
        if options:
            raise InputError(f"{method.name} is already built; it takes no {sorted(options)}")
        return method
    if method not in REDUCERS:
        raise unknown("method", method, REDUCERS)
    reducer = REDUCERS[method]
    names = [field.name for field in dataclasses.fields(reducer)]
    for name in options:
        if name not in names:
            raise _unknown_option(method, name, names)
    return reducer(**options)


def method_name(method: str, args: dict[str, Any]) -> str:
    """Name a method with its first two options and all that are not at defaults."""
    given = []
    for place, field in enumerate(dataclasses.fields(REDUCERS[method])):
        value = args[field.name]
        principal = place < 2 and not isinstance(value, bool)
        if value is not None and (principal or value != field.default):
            given.append(f"{field.name}={_value(value)}")
    return f"{method}({', '.join(given)})" if given else method


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        first, *others = value or [None]
        same = len(others) > 1 and set(others) == {first}
        return f"{first} x {len(value)}" if same else show(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unknown_option(method: str, name: str, names: list[str]) -> InputError:
    owners = [
        owner
        for owner, reducer in REDUCERS.items()
        if name in {field.name for field in dataclasses.fields(reducer)}
    ]
    if owners:
        has = f"its options: {', '.join(names)}" if names else "it has none"
        return InputError(f"{method} has no option {name!r} ({', '.join(owners)} has); {has}")
    return unknown(f"option of {method}", name, names)
