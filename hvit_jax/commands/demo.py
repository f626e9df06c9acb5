"""`hvit demo`: try the methods in the browser."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hvit_jax.browser.config import DemoConfig
from hvit_jax.browser.page import serve
from hvit_jax.commands import flags
from hvit_jax.system.run import run

PROGRAM = "hvit demo"
DESCRIPTION = """Try the methods on your own pictures in the browser: prediction, groups of patches
and speed beside the dense model. Ctrl-C ends it. Pictures stay on this machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 0 after Ctrl-C, which is how it ends."""
    words = sys.argv[1:] if arguments is None else arguments
    return run(lambda: _main(words), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    serve(flags.parse(DemoConfig, arguments, program=PROGRAM, description=DESCRIPTION))
