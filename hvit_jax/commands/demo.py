"""The command line of `hvit demo`."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence

from hvit_jax import demo
from hvit_jax.browser.page import make_page
from hvit_jax.browser.session import Session
from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.commands.method_options import numbers
from hvit_jax.config import as_pair
from hvit_jax.errors import InputError
from hvit_jax.system.run import run

PROGRAM = "hvit demo"
_DESCRIPTION = """Try the methods on your own pictures in the browser: prediction, groups of patches
and speed beside the dense model. Ctrl-C ends it. Pictures stay on this machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit status; 0 after Ctrl-C, which is how it ends.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    # Before gradio is imported: it asks the network for news otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from gradio.themes import Default
    except ImportError as error:
        raise InputError("this needs gradio: pip install 'hvit-jax[demo]'") from error
    resolution = None if options.resolution is None else as_pair(options.resolution)
    session = Session(options.checkpoint, resolution)
    _check_address(options.host, options.port)
    # Fonts of the system, where gradio's own would be fetched.
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page = make_page(session)
    page.launch(
        server_name=options.host,
        server_port=options.port,
        theme=theme,
        share=False,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
    )
    print(f"open http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served, before gradio looks for others."""
    if not 1 <= port <= 65535:
        raise InputError(f"--port must be from 1 to 65535, got {port}")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot serve on {host}:{port}: {error.strerror or error}; choose another --port or "
            "--host"
        ) from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    add = parser.add_argument
    help = "a folder written by hvit convert or by training (default: the bundled demo)"
    add("--checkpoint", default=str(demo.checkpoint_dir()), metavar="DIR", help=help)
    size = "picture size in pixels (default: the checkpoint's)"
    add("-r", "--resolution", type=numbers, metavar="N", help=size)
    help = "address to serve on; 0.0.0.0 lets others in (default: 127.0.0.1)"
    add("--host", default="127.0.0.1", metavar="ADDRESS", help=help)
    add("--port", type=int, default=7860, metavar="N", help="default: 7860")
    return parser
