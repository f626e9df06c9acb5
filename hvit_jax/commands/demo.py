"""`hvit demo`: try the methods in the browser."""

from __future__ import annotations

from hvit_jax.browser.config import DemoConfig
from hvit_jax.browser.page import serve
from hvit_jax.commands.flags import command

PROGRAM = "hvit demo"
DESCRIPTION = """Try the methods on your own pictures in the browser: prediction, groups of patches
and speed beside the dense model. Ctrl-C ends it. Pictures stay on this machine."""


main = command(PROGRAM, DemoConfig, serve, DESCRIPTION)
