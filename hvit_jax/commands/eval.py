"""`python eval.py` and `hvit eval`: accuracy and speed of a checkpoint on labelled pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from hvit_jax.api import load, with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.distributed.peers import NoPeers, Peers
from hvit_jax.distributed.together import run_together
from hvit_jax.evaluation.inputs import data_or_demo, open_inputs
from hvit_jax.evaluation.keeping import check_files
from hvit_jax.evaluation.options import PROGRAM, Options, parse_options
from hvit_jax.evaluation.run import evaluate
from hvit_jax.system.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see `hvit eval --help`.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 2 after a user's mistake; 130 or 143 where Ctrl-C or SIGTERM ended it early. One of
        several processes that fails does not return but ends; with 1 where another one was lost.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> int | None:
    options = parse_options(arguments)
    return run_together(lambda peers: _prepare(options, peers), options.processes, PROGRAM)


def _prepare(options: Options, peers: Peers | NoPeers) -> int:
    if peers.index == 0:
        check_files(options)
    data, checkpoint = data_or_demo(options.data, options.checkpoint)
    config = read_description(checkpoint).config
    options.reducer.resolve(with_resolution(config, options.resolution))
    inputs = open_inputs(data, checkpoint)
    quiet = peers.index != 0
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, quiet=quiet)
    if inputs.note is not None:
        messages.print(inputs.note)
    model = load(
        inputs.checkpoint,
        options.reducer,
        resolution=options.resolution,
        dtype=options.dtype,
        attention=options.attention,
        unroll=options.unroll,
    )
    return evaluate(options, inputs, model, messages, peers)
