"""Options: fields of frozen dataclasses with a help text, checked against their types.

Reduction methods and commands declare their options so. Flags, `--help`, the option tables of the
docs and what result files store are all made from these fields.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import operator
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hvit_jax.errors import InputError

Value = TypeVar("Value")
Record = TypeVar("Record", bound="Options")
# What limits a number: the words for it, and how it is compared.
_BOUNDS = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
}


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    short: str | None = None,
    choices: tuple = (),
    least: int | float | None = None,
    most: int | float | None = None,
    above: int | float | None = None,
    metavar: str | None = None,
    group: str | None = None,
    positional: bool = False,
    ends: tuple[str, ...] = (),
) -> Any:
    """Declare an option: a dataclass field that command lines and documents read.

    Args:
        default: its default; without one it must be given. None stands for a value that depends on
            something else, which the help then names.
        help: one line for `--help`; the default is added to it.
        short: a one-letter flag such as "-l".
        choices: the only values that are accepted, if limited; the only words, of an option that
            takes numbers too.
        least: the smallest number that is accepted, if limited.
        most: the largest one, if limited.
        above: what a number must be larger than, if limited.
        metavar: what stands for the value in `--help`.
        group: title of the part of `--help` that the option stands in.
        positional: whether it is written without a flag.
        ends: endings of file names that are accepted, such as ".json", if limited.
    """
    metadata = dict(locals())
    return dataclasses.field(default=metadata.pop("default"), metadata=metadata)


def nested(
    kind: type[Record], *, leave: tuple[str, ...] = (), choices: dict[str, tuple] | None = None
) -> Any:
    """Declare a field that holds another record, whose options become the outer one's flags.

    Args:
        kind: the other record's class.
        leave: those of its options that are no flags here.
        choices: fewer choices for some of its options than they have elsewhere, by their names.
    """
    metadata = {"leave": leave, "inner_choices": choices or {}}
    return dataclasses.field(default_factory=kind, metadata=metadata)


def with_choices(field: dataclasses.Field, choices: tuple | None) -> dataclasses.Field:
    """Copy an option's field with other choices; None leaves it as it is."""
    if choices is None:
        return field
    narrowed = copy.copy(field)
    narrowed.metadata = types.MappingProxyType({**field.metadata, "choices": choices})
    return narrowed


@dataclass(frozen=True)
class Options:
    """Base of every record of options: it checks its values when it is made.

    Raises:
        InputError: for a value that its field does not accept.
    """

    # What messages call a field, such as "rope: {}"; "": its flag.
    called: ClassVar[str] = ""

    def __post_init__(self):
        kinds = hints(type(self))
        for field in dataclasses.fields(self):
            value, label = getattr(self, field.name), self.label(field.name)
            value = checked_value(field, kinds[field.name], value, label)
            object.__setattr__(self, field.name, value)
            for name, choices in field.metadata.get("inner_choices", {}).items():
                inner = with_choices(type(value).__dataclass_fields__[name], choices)
                checked_value(inner, hints(type(value))[name], getattr(value, name), flag(name))

    @classmethod
    def label(cls, name: str) -> str:
        """Name a field in messages; see `called`."""
        return cls.called.format(name) if cls.called else flag(name)

    def words(self) -> list[str]:
        """Write the record as the words of its command line; defaults are left out."""
        words = []
        metadata = {field.name: field.metadata for field in dataclasses.fields(self)}
        for name, value in given(self).items():
            if metadata[name].get("positional"):
                words += map(str, value if isinstance(value, tuple) else (value,))
            elif isinstance(value, Options):
                words += value.words()
            elif isinstance(value, bool):
                words.append(flag(name) if value else flag(f"no_{name}"))
            elif value is not None:
                words += [flag(name), show(value)]
        return words


def show(value: Any) -> str:
    """Write an option's value as the command line reads it: lists as `6,12,18`."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def flag(name: str) -> str:
    """Write a field's name as a flag."""
    return "--" + name.replace("_", "-")


def known(value: Value | None) -> Value:
    """Read an option whose default depends on the model.

    Raises:
        InputError: if the method has not been resolved, so that the value is not known.
    """
    if value is None:
        raise InputError("this option depends on the model's size; call resolve(config) first")
    return value


def given(record: Options) -> dict[str, Any]:
    """List the options of a record that are not at their defaults."""
    values = {field: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {field.name: value for field, value in values.items() if value != default_of(field)}


def default_of(field: dataclasses.Field) -> Any:
    """Find a field's default; `dataclasses.MISSING` where it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def hints(record: type[Options]) -> dict[str, Any]:
    """List the types of a record's fields."""
    return typing.get_type_hints(record)


def as_json(value: Any) -> Any:
    """Write a record, or a value of one, as JSON can hold it; `from_json` reads it."""
    if isinstance(value, Options):
        return {
            field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(record: type[Record], content: dict[str, Any], **replaced: Any) -> Record:
    """Make a record from what `as_json` wrote; what is missing takes its default.

    Args:
        record: its class.
        content: the values by field.
        **replaced: values that come from elsewhere.

    Raises:
        InputError: for a value that its field does not accept, or one of no field.
    """
    names = [field.name for field in dataclasses.fields(record)]
    surplus = sorted(set(content) - set(names))
    if surplus:
        raise InputError(f"{record.__name__} has no {', '.join(surplus)}")
    kinds, values = hints(record), dict(replaced)
    for name in content.keys() - replaced.keys():
        value = content[name]
        held = [
            kind
            for kind in alternatives(kinds[name])
            if isinstance(kind, type) and issubclass(kind, Options) and isinstance(value, dict)
        ]
        values[name] = from_json(held[0], value) if held else value
    return record(**values)


def checked_value(field: dataclasses.Field, hint: Any, value: Any, label: str) -> Any:
    """Check a value, which messages call `label`, against its field's type, choices and range.

    Returns:
        The value; a list has become a tuple, so that the record stays hashable, and words have
        become paths where the field holds paths.

    Raises:
        InputError: for a value that the field does not accept.
    """
    value, kinds = tuple(value) if isinstance(value, list) else value, alternatives(hint)
    if isinstance(value, str) and Path in kinds and str not in kinds:
        value = Path(value)
    if isinstance(value, tuple) and hint == tuple[Path, ...]:
        value = tuple(Path(item) if isinstance(item, str) else item for item in value)
    items = [each for each in (value if isinstance(value, tuple) else (value,)) if each is not None]
    choices, numbers = field.metadata.get("choices"), {int, float} & {*kinds}
    for item in items:
        if choices and item not in choices and not (numbers and isinstance(item, int | float)):
            # Closer than gpu is to tpu.
            near = difflib.get_close_matches(str(item), map(str, choices), n=1, cutoff=0.7)
            nearest = f", did you mean {near[0]}?" if near else ""
            known = ", ".join([*(["a number"] if numbers else []), *map(str, choices)])
            raise InputError(f"{label} must be one of {known}: {item!r}{nearest}")
    if not matches(value, hint):
        raise InputError(f"{label} must be {_describe(hint)}, got {value!r}")
    ends = field.metadata.get("ends")
    for item in items:
        if ends and Path(item).suffix.lower() not in ends:
            raise InputError(f"{label} takes a name that ends in {', '.join(ends)}, got {item}")
    bounds = {name: field.metadata.get(name) for name in _BOUNDS}
    bounds = {name: bound for name, bound in bounds.items() if bound is not None}
    for item in items:
        if isinstance(item, str):
            continue
        if not all(_BOUNDS[name][1](item, bound) for name, bound in bounds.items()):
            wanted = (f"{_BOUNDS[name][0]} {_plain(bound)}" for name, bound in bounds.items())
            raise InputError(f"{label} must be {' and '.join(wanted)}, got {_plain(item)}")
    return float(value) if isinstance(value, int) and float in kinds and int not in kinds else value


def _plain(number: Any) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def alternatives(hint: Any) -> tuple[Any, ...]:
    """List the types that a field accepts."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def matches(value: Any, hint: Any) -> bool:
    """Tell whether a value has its field's type; ints count as floats, not bools."""
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
    return isinstance(value, typing.get_origin(hint) or hint)


def _describe(hint: Any) -> str:
    """Say in words which values a field's type accepts."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(part) for part in hint.__args__ if part is not type(None))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if parts[-1] is not Ellipsis and len(set(parts)) > 1:
            return f"({', '.join(map(_describe, parts))})"
        count = "a list of" if parts[-1] is Ellipsis else str(len(parts))
        return f"{count} {_describe(parts[0]).removeprefix('a ')}s"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return {**names, Path: "a path"}.get(hint) or f"a {hint.__name__}"


def steps(count: int = 40) -> tuple[float, ...]:
    """Cut the range from 0 to 1 into equal steps, without 0: values that a strength may take."""
    return tuple(step / count for step in range(1, count + 1))
