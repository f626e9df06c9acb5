"""Command lines made from records: every option of a record is a flag, or a positional argument.

A record may hold other records (`nested`), whose options stand beside its own, and a reduction
method, which brings `--method NAME`, `--method-args FILE` and the options of the method named.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import re
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hvit_jax.errors import InputError
from hvit_jax.fields import (
    Options,
    alternatives,
    checked_value,
    default_of,
    flag,
    hints,
    show,
    with_choices,
)
from hvit_jax.models.reducer import Reducer
from hvit_jax.reducers import REDUCERS, make_reducer, method_class
from hvit_jax.system.files import read_json
from hvit_jax.system.run import run
from hvit_jax.version import __version__

Record = TypeVar("Record", bound=Options)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# What names of a method's options start with among the parsed ones.
_METHOD = "method option "


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose complaints are InputErrors, which `run` prints as one line.

    Abbreviated options are refused, so that a new option never changes what an old command means.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._negative_number_matcher = re.compile(r"-\.?\d.*")  # Lists too, such as -8,5,3.

    def error(self, message: str) -> NoReturn:
        """Raise an InputError instead of ending the program."""
        raise InputError(f"{message} (see {self.prog} --help)")


def as_main(work: Callable[[Sequence[str]], int | None], program: str) -> Callable[..., int]:
    """Make the main function of a command.

    Args:
        work: what it does with the words of its command line; returns an exit status, None for 0.
        program: the command, such as "hvit eval".

    Returns:
        A function of the command line, without the program's name (default: the process's own),
        which returns the exit status; see `run`.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        words = sys.argv[1:] if arguments is None else arguments
        return run(lambda: work(words), program)

    return main


def command(
    program: str,
    record: type[Record],
    work: Callable[[Record], int | None],
    description: str,
    epilog: str | None = None,
) -> Callable[..., int]:
    """Make the main function of a command that needs nothing but the record of its options.

    Args:
        program: as for `as_main`.
        record: the class of its options.
        work: what it does with them; returns an exit status, None for 0.
        description: what it does, for `--help`.
        epilog: what `--help` ends with.
    """
    return as_main(lambda words: work(parse(record, words, program, description, epilog)), program)


def parse(
    record: type[Record],
    arguments: Sequence[str],
    program: str,
    description: str = "",
    epilog: str | None = None,
    *,
    base: Record | None = None,
) -> Record:
    """Read a command line, without the program's name, as a record.

    What it does not say is as in `base`, which --verify repeats, by default as in the record's
    defaults.

    Raises:
        InputError: for anything in it that is wrong.
    """
    repeated: Reducer | None = getattr(base, "reducer", None)
    method = value_of("--method", arguments, program) or (repeated and repeated.name)
    parser = make_parser(record, program, description, epilog, methods=[method] if method else None)
    options, surplus = parser.parse_known_args(list(arguments))
    if surplus:
        before = list(itertools.takewhile(lambda word: word != surplus[0], arguments))
        raise _not_an_option(parser, surplus[0], method, in_list=_ends_list(record, before))
    found = _build(record, _checked(record, vars(options), method), base)
    if base is not None and getattr(found, "reducer", None) is not repeated:
        raise InputError(
            "--verify repeats the method in its file; leave out --method and its options"
        )
    return found


def value_of(name: str, arguments: Sequence[str], program: str) -> str | None:
    """Find what a command line gives for one option, before the others can be declared."""
    finder = ArgumentParser(prog=program, add_help=False)
    finder.add_argument(name, dest="value")
    return finder.parse_known_args(list(arguments))[0].value


def make_parser(
    record: type[Options],
    program: str,
    description: str,
    epilog: str | None = None,
    *,
    methods: Iterable[str] | None = None,
    add_help: bool = True,
) -> ArgumentParser:
    """Declare every option of a record, and those of methods; default: of the record's own."""
    parser = ArgumentParser(
        prog=program,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
        add_help=add_help,
    )
    parser.add_argument("--version", action="version", version=f"hvit_jax {__version__}")
    groups: dict[str | None, Any] = {None: parser}
    for field, hint in options_of(record):
        title = field.metadata.get("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if _holds(hint, Reducer):
            default = text = _default_method(field)
            if default_of(field) is None:
                text = f"the one that the checkpoint was trained with, otherwise {default}"
            _add_methods(parser, methods or [default], text)
        else:
            _add(groups[title], field, hint, field.name)
    return parser


def options_of(record: type[Options]) -> Iterator[tuple[dataclasses.Field, Any]]:
    """List a record's options and those of the records in it: field and type."""
    kinds = hints(record)
    for field in dataclasses.fields(record):
        kind = kinds[field.name]
        if _is_nested(kind):
            left_out, choices = field.metadata["leave"], field.metadata["inner_choices"]
            for inner, hint in options_of(kind):
                if inner.name not in left_out:
                    yield with_choices(inner, choices.get(inner.name)), hint
        else:
            yield field, kind


def _checked(record: type[Options], found: dict[str, Any], method: str | None) -> dict[str, Any]:
    """Check the values that were found, and build the method of its name, file and options."""
    values = {}
    for field, hint in options_of(record):
        if _holds(hint, Reducer):
            if any(name in ("method", "method_args") or _METHOD in name for name in found):
                values[field.name] = _method(found, method or _default_method(field))
        elif field.name in found:
            label = field.name.upper() if field.metadata["positional"] else flag(field.name)
            value = checked_value(field, hint, found[field.name], label)
            if field.metadata["positional"]:
                _refuse_end_of_list(value, label, found)
            values[field.name] = value
    return values


def _refuse_end_of_list(value: Any, label: str, found: dict[str, Any]) -> None:
    """Refuse what stands alone but looks like the end of a list that was written with spaces."""
    lists = [each for each in found.values() if isinstance(each, tuple)]
    of_methods = [each for each in lists if each and _are_methods(*each, value)]
    if of_methods:
        example = f": {show((*of_methods[0], value))}"
    elif _NUMBER.fullmatch(str(value)):
        example = ", such as 6,12,18"
    else:
        return
    raise InputError(
        f"{value!r} would be read as {label}; lists are written with commas{example} (a folder of "
        f"that name: ./{value})"
    )


def _are_methods(*words: Any) -> bool:
    return all(part in REDUCERS for word in words for part in str(word).split("+"))


def _build(record: type[Record], values: dict[str, Any], base: Record | None) -> Record:
    """Make a record, and those in it, from values by the names of their fields."""
    own, kinds = {}, hints(record)
    for field in dataclasses.fields(record):
        name = field.name
        if _is_nested(kinds[name]):
            inner = {each: values[each] for each in values if each not in field.metadata["leave"]}
            own[name] = _build(kinds[name], inner, None if base is None else getattr(base, name))
        elif name in values:
            own[name] = values[name]
    return record(**own) if base is None else dataclasses.replace(base, **own)


def read_method_args(path: str | Path, method: str) -> dict[str, Any]:
    """Read a method's options from a file: calibrate's, or the results of an evaluation.

    Raises:
        InputError: if the file cannot be read, is of another method, or its options are wrong.
    """
    content = read_json(Path(path))
    if not (isinstance(content.get("args"), dict) and isinstance(content.get("method"), str)):
        raise InputError(
            f"{path} holds no method's options, as hvit calibrate and hvit eval --output write them"
        )
    if (named := content["method"]) != method:
        raise InputError(
            f"{path} is for the method {named!r}, not {method!r}; give --method {named}"
        )
    try:
        make_reducer(method, **content["args"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return content["args"]


def _holds(hint: Any, kind: type) -> bool:
    return any(isinstance(each, type) and issubclass(each, kind) for each in alternatives(hint))


def _default_method(field: dataclasses.Field) -> str:
    """Name the method of a record's field if no checkpoint and no user says otherwise."""
    return (default_of(field) or field.metadata["otherwise"]).name


def _is_nested(hint: Any) -> bool:
    return _holds(hint, Options) and not _holds(hint, Reducer)


def _add_methods(parser: ArgumentParser, methods: Iterable[str], default: str) -> None:
    """Declare `--method`, whose default is told in words, `--method-args` and methods' options."""
    known = ", ".join(REDUCERS)
    text = (
        f"one of {known}, or two in a row as FIRST+SECOND; --method NAME --help lists its options "
        f"(default: {default})"
    )
    parser.add_argument("--method", default=argparse.SUPPRESS, metavar="NAME", help=text)
    file = (
        "JSON file with the method's options, as calibrate --output and eval --output write them, "
        'such as {"method": "tome", "args": {"r": 8}}; options given here win'
    )
    parser.add_argument("--method-args", default=argparse.SUPPRESS, metavar="FILE", help=file)
    for method in methods:
        kinds = hints(kind := method_class(method))
        declared = parser._option_string_actions
        fields = [each for each in dataclasses.fields(kind) if flag(each.name) not in declared]
        group = parser.add_argument_group(f"options of {method}") if fields else parser
        for field in fields:
            _add(group, field, kinds[field.name], _METHOD + field.name)


def _method(found: dict[str, Any], name: str) -> Reducer:
    from_file = read_method_args(found["method_args"], name) if "method_args" in found else {}
    options = {
        key.removeprefix(_METHOD): value for key, value in found.items() if key.startswith(_METHOD)
    }
    return make_reducer(name, **{**from_file, **options})


def _flags(field: dataclasses.Field) -> list[str]:
    short = field.metadata.get("short")
    return [*([short] if short else []), flag(field.name)]


def _add(group: Any, field: dataclasses.Field, hint: Any, name: str) -> None:
    """Declare one option; the record itself checks type and range."""
    kinds, several, metavar = kinds_of(hint), _is_list(hint), field.metadata["metavar"]
    positional, required = field.metadata["positional"], field.default is dataclasses.MISSING
    declared: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(field)}
    if choices := field.metadata["choices"]:
        metavar = metavar or "{" + ",".join(map(str, choices)) + "}"
    if bool in kinds:
        # What a method's file may have on can be put off.
        only_on = field.default is False and not name.startswith(_METHOD)
        declared["action"] = "store_true" if only_on else argparse.BooleanOptionalAction
    elif positional:
        nargs = {"nargs": "+"} if several else {} if required else {"nargs": "?"}
        declared |= {"metavar": metavar or name.upper(), **nargs}
    elif several:
        any_length = any(Ellipsis in typing.get_args(part) for part in alternatives(hint))
        declared["metavar"] = metavar or ("N[,N...]" if any_length else "N[,N]")
        declared["type"] = lambda text: _several(text, hint)
        if Path in kinds:
            declared["action"] = "extend"  # Files may also be named one flag each.
    elif kinds & {int, float}:
        declared |= {"metavar": metavar or ("X" if float in kinds else "N"), "type": _number}
    else:
        declared["metavar"] = metavar
    if positional:
        group.add_argument(name, **declared)
    else:
        group.add_argument(*_flags(field), dest=name, required=required, **declared)


def _help(field: dataclasses.Field) -> str:
    text, default = field.metadata["help"], field.default
    if default is not False and default not in (None, dataclasses.MISSING, ()):
        shown = "yes" if default is True else show(default)
        text = f"{text} (default: {shown})" if text else f"default: {shown}"
    return text.replace("%", "%%")


def kinds_of(hint: Any) -> set[Any]:
    """List the plain types that an option accepts, those in its lists too."""
    found: set[Any] = set()
    for part in alternatives(hint):
        inner = typing.get_args(part) if typing.get_origin(part) is tuple else (part,)
        found |= set(inner) - {Ellipsis, type(None)}
    return found


def _is_list(hint: Any) -> bool:
    return any(typing.get_origin(part) is tuple for part in alternatives(hint))


def _several(text: str, hint: Any) -> Any:
    """Read `6,12,18`; one value stays alone where the option takes single ones too."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    values = tuple(map(_number, words)) if kinds_of(hint) & {int, float} else tuple(words)
    alone = any(part in (int, float, str, Path) for part in alternatives(hint))
    return values[0] if len(values) == 1 and alone else values


def _number(word: str) -> int | float | str:
    """Read a number; words that are none are kept, so that the check can name them."""
    if not _NUMBER.fullmatch(word):
        return word
    return float(word) if set(word) & set(".eE") else int(word)


def _ends_list(record: type[Options], words: Sequence[str]) -> bool:
    """Tell whether the last option among these words takes a list of names or files."""
    lists = [
        name
        for field, hint in options_of(record)
        if _is_list(hint) and kinds_of(hint) & {str, Path}
        for name in _flags(field)
    ]
    options = [word for word in words if word.startswith("-")]
    return bool(options) and options[-1] in lists


def _initials(flag: str) -> str:
    return "--" + "".join(word[:1] for word in flag.removeprefix("--").split("-"))


def _not_an_option(
    parser: ArgumentParser, word: str, method: str | None, *, in_list: bool
) -> InputError:
    """Describe a surplus word: an option of other methods, a misspelt one, or no option at all."""
    if not word.startswith("-") or _NUMBER.fullmatch(word):
        hint = ": lists are written with commas, such as 6,12,18" if _NUMBER.fullmatch(word) else ""
        hint = ": lists are written with commas, without spaces" if in_list else hint
        return InputError(f"unexpected argument {word!r}{hint} (see {parser.prog} --help)")
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    positive = name.replace("--no-", "--", 1)
    owners = [
        owner
        for owner, reducer in REDUCERS.items()
        if any({name, positive} & set(_flags(field)) for field in dataclasses.fields(reducer))
    ]
    known = [flag for action in parser._actions for flag in action.option_strings]
    if owners and "--method" in known:
        return InputError(
            f"{method or 'the default method'} has no option {name}; it is one of "
            f"{', '.join(owners)}: add --method {owners[0]}, or see {parser.prog} --method "
            f"{method or owners[0]} --help"
        )
    long = [each for each in known if each.startswith("--")]
    longer = [each for each in long if each.startswith(name) and len(name) > 2]
    initials = [each for each in long if name == _initials(each)]  # Such as --lr.
    near = longer or initials or difflib.get_close_matches(name, long, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    return InputError(f"unknown option {name}{hint} (see {parser.prog} --help)")
