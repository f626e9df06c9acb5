"""The command line of `profile.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hvit_jax.api import DTYPES, with_resolution
from hvit_jax.checkpoint import checkpoint_sha256, read_description
from hvit_jax.commands.method_options import numbers, parse_with_method
from hvit_jax.config import MODELS, ViTConfig, as_pair, named_config
from hvit_jax.convert.reader import import_torch
from hvit_jax.errors import InputError
from hvit_jax.ops.fused_attention import IMPLEMENTATIONS
from hvit_jax.profiling.accuracy import Accuracies, published_top1
from hvit_jax.profiling.cases import Case, make_case, published_cases, sweep
from hvit_jax.profiling.measure import Settings
from hvit_jax.system.files import check_destination, refuse_existing
from hvit_jax.system.plotting import check_plot
from hvit_jax.system.run import ArgumentParser

PROGRAM = "hvit profile"
_DESCRIPTION = """Measure what a token reduction method gains on this machine: GFLOPs, latency,
throughput, memory and compile time, beside the dense model in the same run. Weights are random
unless --checkpoint is given; speed does not depend on them."""
_DEFAULT_MODEL = "vit_b16"


def parse_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Case]]:
    """Read a command line, without the program's name.

    Returns:
        The options, `accuracy` as `Accuracies` or None, and what to measure.

    Raises:
        InputError: for anything in it that is wrong.
    """
    parser = _parser()
    options, reducer = parse_with_method(parser, arguments, list_flags=("-r", "--resolution"))
    _check(options)
    if options.rows is None:
        cases = [make_case(_config(options), reducer, options.batch_size)]
    else:
        _refuse_beside_rows(options, reducer.name)
        cases = published_cases(options.rows, batch=options.batch_size)
    if options.accuracy is not None:
        timed = options.checkpoint and checkpoint_sha256(options.checkpoint)
        options.accuracy = Accuracies(options.accuracy, timed)
    if options.plot is not None:
        _check_accuracies(options.accuracy, cases)
    return options, cases if options.sweep is None else sweep(cases, options.sweep)


def _check_accuracies(accuracy: Accuracies | None, cases: list[Case]) -> None:
    """Find out before anything is measured that there would be nothing to draw."""
    top1 = published_top1 if accuracy is None else accuracy.top1
    if any(top1(case.describe()) is not None for case in cases):
        return
    if accuracy is not None:
        raise InputError("no file of --accuracy is of a configuration that is measured here")
    raise InputError(
        "--plot draws published accuracies, and this configuration has none; "
        "--accuracy RESULTS.json draws measured ones"
    )


def settings(options: argparse.Namespace) -> Settings:
    """Pick what says how to measure."""
    return Settings(
        dtype=options.dtype,
        attention=options.attention,
        unroll=options.unroll,
        checkpoint=options.checkpoint,
        seconds=options.seconds,
        latency=options.latency,
        dense=options.dense,
        torch=options.against == "torch",
        trace=options.trace,
    )


def _config(options: argparse.Namespace) -> ViTConfig:
    if options.checkpoint is not None and options.model is not None:
        raise InputError("give --model NAME or --checkpoint DIR, not both")
    if options.checkpoint is not None:
        config = read_description(options.checkpoint).config
    else:
        config = named_config(options.model or _DEFAULT_MODEL)
    if options.resolution is None:
        return config
    try:
        return with_resolution(config, as_pair(options.resolution))
    except InputError as error:
        raise InputError(f"--resolution: {error}") from error


def _refuse_beside_rows(options: argparse.Namespace, method: str) -> None:
    given = {
        "--model": options.model,
        "--checkpoint": options.checkpoint,
        "--resolution": options.resolution,
        "--method-args": options.method_args,
        "--method": None if method == "dense" else method,
        "--trace": options.trace,
    }
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--rows brings its own configurations; leave out {name}")


def _check(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}")
    if not 0 < options.seconds < 3600:
        raise InputError(f"--seconds must be above 0 and below 3600, got {options.seconds:g}")
    if options.trace is not None:
        refuse_existing(options.trace)
        check_destination(options.trace, overwrite=False)
    if options.plot is not None:
        check_plot(options.plot, "--plot")
    elif options.accuracy is not None:
        raise InputError("--accuracy goes with --plot FILE.png")
    if options.against == "torch":
        import_torch()
    if options.gflops_only:
        for name in ("trace", "plot", "against", "sweep"):
            if getattr(options, name) is not None:
                raise InputError(f"--gflops-only measures nothing; leave out --{name}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    _add_what(parser)
    _add_how(parser)
    _add_output(parser)
    return parser


def _add_what(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)} (default: {_DEFAULT_MODEL})")
    add("--checkpoint", metavar="DIR", help="a folder written by hvit convert or by training")
    size = "picture size in pixels, one number or height and width (default: the model's)"
    add("-r", "--resolution", type=numbers, metavar="N [N]", help=size)
    add("-b", "--batch-size", type=int, default=8, metavar="N", help="default: 8")
    rows = "the published rows: all, or those of a method or model; ats, act with implied budgets"
    add("--rows", metavar="all|METHOD|MODEL", help=rows)
    add("--sweep", metavar="batch=N,N", help="measure several batch sizes")


def _add_how(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", choices=DTYPES[:2], default="float32", help="default: float32")
    add("--attention", choices=IMPLEMENTATIONS, default="auto", help="default: auto")
    add("--unroll", action="store_true", help="compile every block on its own: slower to compile")
    gflops = "print GFLOPs and tokens, without running a model"
    add("--gflops-only", action="store_true", help=gflops)
    add("--against", choices=("torch",), help="time PyTorch's dense model in the same run too")
    dense = "do not time the dense model beside the method"
    add("--no-dense", dest="dense", action="store_false", help=dense)
    add("--no-latency", dest="latency", action="store_false", help="do not time single images")
    seconds = "how long one of five rounds of timing takes, about (default: 1)"
    add("--seconds", type=float, default=1.0, metavar="S", help=seconds)
    cache = "do not keep compiled programs on disk (kept in ~/.cache/hvit_jax/xla)"
    add("--no-cache", dest="cache", action="store_false", help=cache)


def _add_output(parser: ArgumentParser) -> None:
    add = parser.add_argument
    output = "write the results after every row: .json, .csv or .md; may be repeated"
    add("--output", type=Path, action="append", default=[], metavar="FILE", help=output)
    add("--resume", action="store_true", help="go on with the rows of --output FILE.json")
    add("--plot", type=Path, metavar="FILE.png", help="draw top-1 against throughput")
    measured = "draw the top-1 of results that eval.py --output wrote (default: the published)"
    add("--accuracy", type=Path, nargs="+", metavar="RESULTS.json", help=measured)
    add("--trace", type=Path, metavar="DIR", help="write a profiler trace of three forward passes")
