"""Importing the package, and its tools, changes nothing in the program that does so."""

import os
import subprocess
import sys

import pytest

import hvit_jax

PROGRAM = """
import logging, os, signal, sys, threading, warnings
import flax.nnx, jax, numpy, orbax.checkpoint, PIL.Image, rich.console

def state():
    loggers = [logging.root, *map(logging.getLogger, list(logging.Logger.manager.loggerDict))]
    return {
        "loggers": {
            each.name: (list(each.handlers), list(each.filters), each.level, each.propagate)
            for each in loggers
            if not each.name.startswith("hvit_jax")
        },
        "handlers": [(each, list(each.filters)) for each in logging.root.handlers],
        "warnings": (list(warnings.filters), warnings.showwarning),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "environment": (dict(os.environ), list(sys.path), threading.active_count()),
        "jax": dict(jax.config.values),
    }

before = state()
import hvit_jax
for tool in sys.argv[1:]:
    getattr(hvit_jax, tool)
after = state()
print([name for name in before if before[name] != after[name]])
"""


def changed(*tools):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *tools], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_changes_nothing():
    assert changed() == "[]"


def test_its_tools_change_nothing():
    tools = [name for name in dir(hvit_jax) if name in (*hvit_jax.__all__, *hvit_jax._PARTS)]
    assert {"load", "evaluation", "costs"} < set(tools) and changed(*tools) == "[]"


def test_the_package_loads_jax_when_it_is_needed():
    code = "import sys, hvit_jax.commands.main; assert 'jax' not in sys.modules; hvit_jax.load"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'jax' in sys.modules"], check=True)


def test_all_exported_names_are_found():
    assert all(getattr(hvit_jax, name) is not None for name in hvit_jax.__all__)
    with pytest.raises(AttributeError, match="module 'hvit_jax' has no attribute 'loda'"):
        _ = hvit_jax.loda
