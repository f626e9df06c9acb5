"""The reduction methods, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvit_jax.errors import InputError, unknown
from hvit_jax.fields import show
from hvit_jax.models.reducer import Layer, Reducer, TokenState
from hvit_jax.reducers.act import ACT
from hvit_jax.reducers.atc import ATC
from hvit_jax.reducers.ats import ATS
from hvit_jax.reducers.budgeted import Budgeted, as_budgeted, warn_without_budgets
from hvit_jax.reducers.chaining import Chain, chain, chain_class
from hvit_jax.reducers.diffrate import DiffRate
from hvit_jax.reducers.evit import EViT
from hvit_jax.reducers.evo import EvoViT
from hvit_jax.reducers.hourglass import Hourglass
from hvit_jax.reducers.mctf import MCTF
from hvit_jax.reducers.pitome import PiToMe
from hvit_jax.reducers.pool import Pool
from hvit_jax.reducers.random import Random
from hvit_jax.reducers.smyrf import SMYRF
from hvit_jax.reducers.tofu import ToFu
from hvit_jax.reducers.tome import ToMe
from hvit_jax.reducers.tome_dense import ToMeDense

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
        ToMeDense,
        SMYRF,
        PiToMe,
        ToFu,
        DiffRate,
        ATC,
        MCTF,
        Random,
        Pool,
    )
}

__all__ = [
    "ACT",
    "ATC",
    "ATS",
    "Budgeted",
    "Chain",
    "DiffRate",
    "EViT",
    "EvoViT",
    "Hourglass",
    "Layer",
    "MCTF",
    "PiToMe",
    "Pool",
    "REDUCERS",
    "Random",
    "Reducer",
    "SMYRF",
    "ToFu",
    "ToMe",
    "ToMeDense",
    "TokenState",
    "as_budgeted",
    "chain",
    "make_reducer",
    "method_class",
    "method_name",
    "method_of_checkpoint",
    "warn_without_budgets",
]


def make_reducer(method: str | Reducer, **options: Any) -> Reducer:
    """Build a method from its name and options.

    Args:
        method: a name, as for `method_class`, or a built method, which takes no further options.
        **options: the fields of the method's dataclass.

    Raises:
        InputError: for an unknown method, an option it does not have, or a value out of range.
    """
    if isinstance(method, Reducer):
        if options:
            raise InputError(f"{method.name} is already built; it takes no {sorted(options)}")
        return method
    reducer = method_class(method)
    names = [field.name for field in dataclasses.fields(reducer)]
    for name in options:
        if name not in names:
            raise _unknown_option(method, name, names)
    return reducer(**options)


def method_class(name: str) -> type[Reducer]:
    """Find a method by its name in `REDUCERS`; FIRST+SECOND is the chain of two.

    Raises:
        InputError: for an unknown method, or one that cannot be chained.
    """
    parts = name.split("+")
    for part in parts:
        if part not in REDUCERS:
            raise unknown("method", part, REDUCERS)
    if len(parts) > 2:
        raise InputError(f"a chain has two methods, not {len(parts)}: {name}")
    kinds = [REDUCERS[part] for part in parts]
    return kinds[0] if len(kinds) == 1 else chain_class(kinds[0], kinds[1])


def method_of_checkpoint(otherwise: Reducer = Reducer()) -> Any:
    """Declare a record's field for the method; None is the one that a checkpoint was trained with.

    Args:
        otherwise: the method if it was not trained with any; `checkpoint.choose_method` chooses.
    """
    return dataclasses.field(default=None, metadata={"otherwise": otherwise})


def method_name(method: str, args: dict[str, Any]) -> str:
    """Name a method with those of its options that are not at their defaults.

    Args:
        method: a name, as for `method_class`.
        args: its options, resolved; a default that depends on the model counts as given. Those that
            an earlier release did not have may be missing.
    """
    fields = dataclasses.fields(method_class(method))
    values = [(each, args.get(each.name, each.default)) for each in fields]
    given = [(each.name, value) for each, value in values if value != each.default]
    return " ".join([method, *(f"{name}={_value(value)}" for name, value in given)])


def _value(value: Any) -> str:
    """Write an option's value, briefly; one that is equal in all blocks stands once."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) > 2 and len(set(items)) == 1:
        del items[1:]
    return show([float(f"{item:.4g}") if isinstance(item, float) else item for item in items])


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
