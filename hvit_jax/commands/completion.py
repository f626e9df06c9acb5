"""Shell completion, made from the records that the commands are made from; needs shtab."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hvit_jax.commands.flags import ArgumentParser, kinds_of, make_parser, options_of
from hvit_jax.errors import import_optional, unknown
from hvit_jax.fields import Options, flag, hints
from hvit_jax.reducers import REDUCERS


def completion(shell: str, commands: dict[str, tuple[str, type[Options]]]) -> str:
    """Write a script that completes commands, options and their values in a shell.

    Args:
        shell: "bash", "zsh" or another one that shtab knows.
        commands: what each of the program's commands does, and the record of its options.
    """
    shtab = import_optional("shtab", "this needs shtab: pip install 'hvit-jax[completion]'")
    if shell not in shtab.SUPPORTED_SHELLS:
        raise unknown("shell", shell, shtab.SUPPORTED_SHELLS)
    root = ArgumentParser(prog="hvit")
    each = root.add_subparsers()
    for name, (help, record) in commands.items():
        own = make_parser(record, f"hvit {name}", help, methods=REDUCERS, add_help=False)
        _name_values(own, record, shtab.FILE, shtab.DIRECTORY)
        each.add_parser(name, help=help, parents=[own])
    return shtab.complete(root, shell)


def _name_values(parser: ArgumentParser, record: type[Options], file: Any, folder: Any) -> None:
    """Tell which values options take, as shtab looks for them."""
    actions = {
        name: action
        for action in parser._actions
        for name in action.option_strings or (action.dest,)
    }
    found = list(options_of(record))
    for reducer in REDUCERS.values():
        kinds = hints(reducer)
        found += [(field, kinds[field.name]) for field in dataclasses.fields(reducer)]
    for field, hint in found:
        action = actions.get(flag(field.name)) or actions.get(field.name)
        if action is None:
            continue
        if field.metadata.get("choices"):
            action.choices = field.metadata["choices"]
        elif Path in kinds_of(hint):
            is_folder = field.metadata["metavar"] == "DIR"
            action.complete = folder if is_folder else file  # pyright: ignore
    if "--method" in actions:
        actions["--method"].choices = list(REDUCERS)
        actions["--method-args"].complete = file  # pyright: ignore
