"""Measure what a reduction method gains: the command `hvit profile`.

Python has a module of this name too, which cProfile, PyTorch and others import. They find this file
when Python runs from this folder, so when imported it hands over the standard one.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path


def _hand_over(name: str) -> None:
    path = Path(sysconfig.get_path("stdlib")) / "profile.py"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"Python's own module profile is missing at {path}", name=name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    from hvit_jax.commands.main import program

    program(["profile", *sys.argv[1:]])

_hand_over(__name__)
