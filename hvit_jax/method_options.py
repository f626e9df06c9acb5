"""Command-line options of the reduction methods, made from the fields of their dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from hvit_jax.command_line import ArgumentParser
from hvit_jax.errors import InputError, unknown
from hvit_jax.method_files import read_method_args
from hvit_jax.reducers import REDUCERS, Reducer, make_reducer

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_NO_NUMBER = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
# What names of a method's options start with among the parsed ones.
OPTION_PREFIX = "method option "
_SEVERAL = "N [N ...]"


def parse_with_method(
    parser: ArgumentParser,
    arguments: Sequence[str],
    *,
    default: str = "dense",
    list_flags: Iterable[str] = (),
) -> tuple[argparse.Namespace, Reducer]:
    """Parse a command line that has `--method NAME` and that method's own options.

    Args:
        parser: a parser with the command's general options; it gets `--method`, `--method-args` and
            the options of the chosen method, which `--help` then shows too.
        arguments: the command line, without the program's name.
        default: the method where none is given.
        list_flags: general options that take several numbers, declared with `type=numbers`.

    Returns:
        The general options, and the method with its own.

    Raises:
        InputError: for an unknown method or option, or an option of another method.
    """
    method = _chosen_method(parser, arguments, default)
    flags = [*list_flags, *_add_options(parser, method)]
    options, surplus = parser.parse_known_args(join_numbers(arguments, flags))
    if surplus:
        raise _not_an_option(parser, surplus[0], method, arguments)
    from_file = read_method_args(options.method_args, method) if options.method_args else {}
    given = {
        name.removeprefix(OPTION_PREFIX): value
        for name, value in vars(options).items()
        if name.startswith(OPTION_PREFIX)
    }
    return options, make_reducer(method, **{**from_file, **given})


def given_options(reducer: Reducer) -> dict[str, Any]:
    """List the options of a method that are not at their defaults."""
    values = {field: getattr(reducer, field.name) for field in dataclasses.fields(reducer)}
    return {field.name: value for field, value in values.items() if value != field.default}


def command_words(reducer: Reducer) -> list[str]:
    """Write a method as the words that `parse_with_method` reads; defaults are left out."""
    words = ["--method", reducer.name]
    for name, value in given_options(reducer).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def numbers(text: str) -> int | float | str | tuple[int | float | str, ...]:
    """Read one number, or several that are separated by spaces or commas.

    Words that are no numbers are kept, so that whoever checks the value can name them.
    """
    values = tuple(map(_number, text.replace(",", " ").split()))
    return values[0] if len(values) == 1 else values


def numbers_hint(arguments: Sequence[str], word: str) -> str:
    """Tell, in brackets, why a word is not read as one of the numbers that stand before it.

    Args:
        arguments: the command line, without the program's name.
        word: one of them, which turned out to be wrong.

    Returns:
        The hint; empty for a word that stands behind no numbers.
    """
    before = list(arguments[: arguments.index(word)])
    while before and _may_be_number(before[-1]):
        before.pop()
    flag, equals, first = before[-1].partition("=") if before else ("", "", "")
    values = first.replace(",", " ").split() if equals else arguments[len(before) : len(before) + 1]
    behind = values and word not in values and all(map(_may_be_number, values))
    if not flag.startswith("-") or not behind:
        return ""
    return f" ({flag} takes numbers, so {word!r} behind them is read as DATA)"


def _may_be_number(word: str) -> bool:
    """Tell numbers, and what is meant as one but refused later, from paths and options."""
    return bool(_NUMBER.fullmatch(word) or _NO_NUMBER.fullmatch(word))


def _number(word: str) -> int | float | str:
    if not _NUMBER.fullmatch(word):
        return word
    return float(word) if set(word) & set(".eE") else int(word)


def _chosen_method(parser: ArgumentParser, arguments: Sequence[str], default: str) -> str:
    """Declare `--method`, and read it before its options can be declared."""
    known = ", ".join(REDUCERS)
    text = f"one of {known} (default: {default}); --method NAME --help lists its options"
    finder = ArgumentParser(prog=parser.prog, add_help=False)
    for each in (parser, finder):
        each.add_argument("--method", default=default, metavar="NAME", help=text)
    file = "JSON file with the method's options, from calibrate or --output; options here win"
    parser.add_argument("--method-args", metavar="FILE", help=file)
    method = finder.parse_known_args(arguments)[0].method
    if method not in REDUCERS:
        raise unknown("method", method, REDUCERS)
    return method


def _flags(field: dataclasses.Field) -> list[str]:
    short = field.metadata.get("short")
    return [*([short] if short else []), "--" + field.name.replace("_", "-")]


def _add_options(parser: ArgumentParser, method: str) -> list[str]:
    """Declare a method's options, and name the flags that take several numbers."""
    reducer = REDUCERS[method]
    fields, hints = dataclasses.fields(reducer), typing.get_type_hints(reducer)
    if not fields:
        return []
    group = parser.add_argument_group(f"options of {method}")
    lists = []
    for field in fields:
        declared = _declaration(field, hints[field.name])
        group.add_argument(*_flags(field), dest=OPTION_PREFIX + field.name, **declared)
        lists += _flags(field) if declared.get("metavar") == _SEVERAL else []
    return lists


def _declaration(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    """Say how argparse reads a field; the dataclass itself checks type and range."""
    help = field.metadata["help"]
    if field.default is not None:
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        help += f" (default: {shown})"
    common = {"default": argparse.SUPPRESS, "help": help.replace("%", "%%")}
    types_ = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in types_:
        return {**common, "action": argparse.BooleanOptionalAction}
    if set(types_) <= {str, types.NoneType}:
        choices = field.metadata["choices"]
        return {**common, "metavar": "{" + ",".join(choices) + "}" if choices else "WORD"}
    if not any(typing.get_origin(kind) is tuple for kind in types_):
        return {**common, "type": _number, "metavar": "N"}
    scalar = bool({int, float, str} & set(types_))
    return {**common, "type": numbers if scalar else _number_list, "metavar": _SEVERAL}


def _number_list(text: str) -> tuple[Any, ...]:
    values = numbers(text)
    return values if isinstance(values, tuple) else (values,)


def join_numbers(arguments: Sequence[str], flags: Iterable[str]) -> list[str]:
    """Join the numbers behind a flag to one argument, so that a path may follow them.

    argparse's own lists swallow every argument up to the next option.

    Args:
        arguments: the command line, without the program's name.
        flags: options that take several numbers, declared with `type=numbers`.
    """
    flags, joined, rest = set(flags), [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest]
        name, equals, first = word.partition("=")
        if name not in flags:
            joined.append(word)
            continue
        found = list(itertools.takewhile(_may_be_number, rest))
        del rest[: len(found)]
        joined.append(name)
        values = ([first] if equals else []) + found
        joined += [" ".join(values)] if values else []
    return joined


def _not_an_option(
    parser: ArgumentParser, word: str, method: str, arguments: Sequence[str]
) -> InputError:
    """Describe a surplus word: an option of other methods, a misspelt one, or no option at all."""
    if not word.startswith("-"):
        hint = numbers_hint(arguments, word)
        return InputError(f"unexpected argument {word!r}{hint} (see {parser.prog} --help)")
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    positive = name.replace("--no-", "--", 1)
    owners = [
        owner
        for owner, reducer in REDUCERS.items()
        if any({name, positive} & set(_flags(field)) for field in dataclasses.fields(reducer))
    ]
    if owners:
        return InputError(
            f"{method} has no option {name}; it is one of {', '.join(owners)}: add --method "
            f"{owners[0]}, or see {parser.prog} --method {method} --help"
        )
    known = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    return InputError(f"unknown option {name}{hint} (see {parser.prog} --help)")
