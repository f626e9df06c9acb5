"""The program `hvit`, also `python -m hvit_jax`: one command for everything."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from hvit_jax.errors import unknown
from hvit_jax.fields import Options
from hvit_jax.system.run import leave, run
from hvit_jax.system.signals import loading
from hvit_jax.version import __version__

# What each command does, and where the record of its options stands.
COMMANDS = {
    "models": ("list the models that can be made by name", "catalogue.ModelsConfig"),
    "convert": ("port a PyTorch checkpoint, or write one back", "convert.config.ConvertConfig"),
    "eval": ("measure accuracy and speed on labelled pictures", "evaluation.config.EvalConfig"),
    "segment": ("segment pictures; measure mIoU and speed", "dense.config.SegmentConfig"),
    "depth": ("estimate depth; measure errors and speed", "dense.config.DepthConfig"),
    "profile": (
        "measure GFLOPs, speed and memory; reproduce the published tables",
        "profiling.config.ProfileConfig",
    ),
    "train": ("train or fine-tune, under any method", "training.config.TrainConfig"),
    "compare": (
        "compare all methods on your pictures and name the setting to use",
        "comparing.config.CompareConfig",
    ),
    "calibrate": (
        "measure budgets for ATS and ACT on your pictures",
        "calibration.config.CalibrateConfig",
    ),
    "visualize": ("draw what a method does to pictures", "visualization.config.VisualizeConfig"),
    "export": (
        "write a model as programs that run without this package",
        "exporting.config.ExportConfig",
    ),
    "demo": ("try the methods in the browser", "browser.config.DemoConfig"),
}

OPTIONS = ("--help", "--version", "--print-completion")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return run(lambda: _main(words), "hvit")


def program(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line as the whole of this process, and end it with the exit status."""
    leave(main(arguments))


def _main(words: list[str]) -> int | None:
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if words[0] == "--version":
        print(f"hvit_jax {__version__}")
        return 0
    if words[0] == "--print-completion":
        from hvit_jax.commands.completion import completion

        print(completion(words[1] if len(words) > 1 else "", records()))
        return 0
    if words[0].startswith("-"):
        raise unknown("option", words[0], OPTIONS)
    if words[0] not in COMMANDS:
        raise unknown("command", words[0], COMMANDS)
    with loading(f"hvit {words[0]}"):
        command = importlib.import_module(f"hvit_jax.commands.{words[0]}")
    return command.main(words[1:])


def records() -> dict[str, tuple[str, type[Options]]]:
    """Import the records of all commands: what each command does, and its record."""
    found = {}
    for name, (text, place) in COMMANDS.items():
        module, _, record = place.rpartition(".")
        found[name] = text, getattr(importlib.import_module(f"hvit_jax.{module}"), record)
    return found


def usage() -> str:
    """List the commands."""
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in COMMANDS.items())
    return f"""usage: hvit COMMAND ...

Vision transformers with token reduction in JAX.

{lines}

hvit COMMAND --help lists a command's options.
hvit --version, hvit --print-completion bash|zsh
"""
