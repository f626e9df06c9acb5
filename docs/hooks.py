"""Parts of the documentation that are made from the code and from measured results.

Each stands in its page, so that the file can be read as it is, between `<!-- KIND: NAME -->` and
`<!-- end -->`. `python docs/hooks.py` writes them anew after a change, and a test compares them:

    about     what a method does, from its docstring
    options   a method's options
    results   what was published and measured of a method
    command   a command's options
    api       a name's signature and what it is; on the site, all of its documentation
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pkgutil
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from hvit_jax import REDUCERS, make_reducer
from hvit_jax.commands.flags import options_of
from hvit_jax.commands.main import records
from hvit_jax.fields import Options, flag, show
from hvit_jax.published import published_rows
from hvit_jax.reducers import method_name

_PLAIN = (str, int, float, tuple, type(None))  # Types of defaults that are short to write.
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_PART = re.compile(r"^<!-- (\w+): (\S+)(.*?) -->\n(.*?)<!-- end -->$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let mkdocstrings document the names of the API; MkDocs calls this for each page."""

    def document(found: re.Match) -> str:
        if found[1] != "api":
            return found[0]
        members = f"\n    options:\n      members: [{found[3].strip()}]" if found[3] else ""
        return f"::: {found[2]}{members}"

    return _PART.sub(document, markdown)


def filled(page: str) -> str:
    """Write the parts of a page anew.

    Raises:
        KeyError: for a kind, method or command that does not exist.
    """
    kinds = {
        "about": about_method,
        "options": options_table,
        "results": results_tables,
        "command": command_tables,
        "api": describe_name,
    }

    def fill(found: re.Match) -> str:
        head = f"<!-- {found[1]}: {found[2]}{found[3]} -->"
        return f"{head}\n\n{kinds[found[1]](found[2])}\n\n<!-- end -->"

    return _PART.sub(fill, page)


def about_method(method: str) -> str:
    """Say what a method does."""
    return inspect.getdoc(REDUCERS[method]) or ""


def describe_name(name: str) -> str:
    """Write the signature of a function or class, or of all in a module, and what each is."""
    found = pkgutil.resolve_name(name)
    if not inspect.ismodule(found):
        return _entry(name, found)
    return "\n\n".join(_entry(f"{name}.{each.__name__}", each) for each in public_in(found))


def public_in(module: types.ModuleType) -> list[Any]:
    """List the functions and classes that a module defines for others."""
    made = [
        each for each in vars(module).values() if inspect.isroutine(each) or inspect.isclass(each)
    ]
    own = [each for each in made if each.__module__ == module.__name__]
    return [each for each in own if not each.__name__.startswith("_")]


def _entry(name: str, found: Any) -> str:
    about = (inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ")
    is_record = isinstance(found, type) and issubclass(found, (Options, Exception))
    return f"**`{name}{'' if is_record else _signature(found)}`**: {about}"


def _signature(found: Any) -> str:
    """Write parameters without types; a default that is no plain value is elided."""
    made = found.__init__ if isinstance(found, type) and issubclass(found, nnx.Module) else found
    parameters = []
    for each in inspect.signature(made).parameters.values():
        plain = each.default is each.empty or isinstance(each.default, _PLAIN)
        if each.name != "self":
            default = each.default if plain else _Elided()
            parameters.append(each.replace(annotation=each.empty, default=default))
    return str(inspect.Signature(parameters))


class _Elided:
    def __repr__(self) -> str:
        return "..."


def options_table(method: str) -> str:
    """List a method's options with their flags, defaults and help."""
    rows = []
    for field in dataclasses.fields(REDUCERS[method]):
        flags = [field.metadata["short"], "--" + field.name.replace("_", "-")]
        shown = ", ".join(f"`{flag}`" for flag in flags if flag)
        default = "" if field.default is None else f"`{show(field.default)}`"
        rows.append((f"`{field.name}`", shown, default, field.metadata["help"]))
    return _table(("option", "flag", "default", "meaning"), rows)


def command_tables(name: str) -> str:
    """List a command's options by group, those of its reduction method left out."""
    groups: dict[str, list[tuple[str, ...]]] = {}
    for field, _ in options_of(records()[name][1]):
        if field.metadata.get("help") is None:
            continue
        title = field.metadata["group"] or "options"
        groups.setdefault(title, []).append(_option_row(field))
    head = ("field", "flag", "default", "meaning")
    return "\n\n".join(f"**{title}**\n\n{_table(head, rows)}" for title, rows in groups.items())


def _option_row(field: dataclasses.Field) -> tuple[str, ...]:
    if field.metadata["positional"]:
        flags = field.name.upper()
    else:
        flags = ", ".join(filter(None, (field.metadata["short"], flag(field.name))))
    default = field.default
    if "by default" in field.metadata["help"]:  # It depends on the machine.
        default = None
    known = default is not dataclasses.MISSING and default is not None
    shown = show(default) if known else "" if default is None else "required"
    return f"`{field.name}`", f"`{flags}`", shown and f"`{shown}`", field.metadata["help"]


def results_tables(method: str) -> str:
    """Show a method's published rows, and what was measured of it here."""
    parts = [
        "Published (ImageNet-1k, V100, float32):",
        _table(
            ("model", "options", "GFLOPs", "top-1 (%)", "images/s"),
            [
                (row["model"], _given(row), *_shown(row["published"]))
                for row in published_rows()
                if row["method"] == method
            ],
        ),
        "Measured, ViT-B/16 at 384 pixels, float32, two cores of an AMD EPYC, random weights:",
        _table(
            ("options", "GFLOPs", "speed-up over dense"),
            [
                (_given(row), f"{row['gflops']:.1f}", f"{row['speedup_over_dense']:.2f}")
                for row in _results("cpu.json")
                if row["method"] == method
            ],
        ),
        "Measured on the [demo](../demo.md), where the dense model has 90.8 %:",
        _table(
            ("options", "GFLOPs", "top-1 (%)"),
            [
                (_given(row), f"{row['gflops']:.3f}", f"{row['top1']:.1f}")
                for row in _results("demo.json")
                if row["method"] == method
            ],
        ),
    ]
    return "\n\n".join(parts)


def _results(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]


def _shown(published: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(published.get(name, "")) for name in ("gflops", "top1", "throughput"))


def _given(row: dict[str, Any]) -> str:
    """Name the options of a row that are not the method's defaults."""
    options = {**make_reducer(row["method"]).options(), **row["args"]}
    return method_name(row["method"], options).partition(" ")[2] or "defaults"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if page != (new := filled(page)):
            path.write_text(new, encoding="utf-8")
            print(f"written: {path}")
