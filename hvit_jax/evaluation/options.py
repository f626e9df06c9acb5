"""The command line of `eval.py`."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax.api import DTYPES
from hvit_jax.commands.method_options import numbers, numbers_hint, parse_with_method
from hvit_jax.config import as_pair
from hvit_jax.distributed.processes import Processes, add_process_options, find_processes
from hvit_jax.errors import InputError
from hvit_jax.evaluation.verify import read_results, words_of
from hvit_jax.ops.fused_attention import IMPLEMENTATIONS
from hvit_jax.reducers import Reducer
from hvit_jax.system.run import ArgumentParser

PROGRAM = "hvit eval"
_DESCRIPTION = """Measure accuracy and speed of a checkpoint on labelled pictures, dense or under a
token reduction method. With neither DATA nor --checkpoint the bundled demo runs."""
_DATA = """class folders of pictures, a folder whose img_val/ or val/ holds them, or
tfds:NAME[:SPLIT]"""


@dataclass(frozen=True)
class Options:
    """What to evaluate, and how.

    Attributes:
        data: a folder or `tfds:NAME[:SPLIT]`; None for the demo.
        checkpoint: a checkpoint's folder; None for the demo.
        reducer: the method.
        resolution: height and width in pixels; None for the checkpoint's own.
        batch_size: pictures on the device at once.
        workers: processes that decode.
        dtype: "float32" or "bfloat16".
        attention: "auto", "cudnn" or "xla".
        unroll: whether to compile every block on its own.
        on_error: "stop" at pictures that cannot be read, or "skip" them.
        output: where `results.json` goes.
        predictions: where single results go.
        overwrite: whether the two may replace files.
        resume: whether to go on with what an earlier run has scored.
        processes: the processes of the run; None for this one alone.
        recorded: the results that it repeats; None for none.
    """

    data: str | None
    checkpoint: str | None
    reducer: Reducer
    resolution: tuple[int, int] | None
    batch_size: int
    workers: int
    dtype: str
    attention: str
    unroll: bool
    on_error: str
    output: Path | None
    predictions: Path | None
    overwrite: bool
    resume: bool
    processes: Processes | None
    recorded: dict[str, Any] | None


def parse_options(arguments: Sequence[str]) -> Options:
    """Read a command line, without the program's name.

    Raises:
        InputError: for anything in it that is wrong.
    """
    given, reducer = _parse(arguments)
    recorded = None if given.verify is None else read_results(given.verify)
    if given.verify is not None and recorded is not None:
        if any(word.split("=")[0] == "--method" for word in arguments):
            raise InputError("--verify repeats what its file names; leave --method out")
        # What the command line says besides, such as another folder for DATA, wins.
        given, reducer = _parse([*words_of(given.verify, recorded, data=given.data), *arguments])
    names = [field.name for field in dataclasses.fields(Options)]
    values = {name: value for name, value in vars(given).items() if name in names}
    values["processes"] = find_processes(given)
    values["resolution"] = _resolution(given.resolution)
    options = Options(**{**values, "reducer": reducer, "recorded": recorded})
    if options.data is not None and options.checkpoint is None:
        raise InputError(
            f"DATA is given without --checkpoint DIR, as {options.data!r}; give both, or neither "
            f"for the demo{numbers_hint(arguments, options.data)}"
        )
    _check(options)
    return options


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Reducer]:
    return parse_with_method(_parser(), arguments, list_flags=("-r", "--resolution"))


def _resolution(given: object) -> tuple[int, int] | None:
    try:
        return None if given is None else as_pair(given)
    except InputError as error:
        raise InputError(
            f"--resolution takes one or two whole numbers of pixels, got {given!r}"
        ) from error


def _check(options: Options) -> None:
    if options.data is None and options.checkpoint is not None:
        raise InputError("--checkpoint DIR is given without DATA; give both, or neither")
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}")
    if options.workers < 0:
        raise InputError(f"--workers must be at least 0, got {options.workers}")
    if options.resume and options.output is None:
        raise InputError("--resume needs --output FILE.json, beside which scored pictures are kept")
    if options.output and options.predictions:
        if options.output.absolute() == options.predictions.absolute():
            raise InputError(f"--output and --predictions both name {options.output}")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    parser.add_argument("data", nargs="?", metavar="DATA", help=_DATA)
    _add_model_options(parser)
    _add_run_options(parser)
    add_process_options(parser)
    return parser


def _add_model_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="a folder written by hvit convert or by training")
    add(
        "-r",
        "--resolution",
        type=numbers,
        metavar="N [N]",
        help="picture size in pixels, one number or height and width (default: the checkpoint's)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="what to compute in (default: float32)")
    add(
        "--attention",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="fused cuDNN kernels or plain XLA (default: auto, cuDNN where it can run)",
    )
    add("--unroll", action="store_true", help="compile every block on its own: slower to compile")


def _add_run_options(parser: ArgumentParser) -> None:
    add, cores = parser.add_argument, min(8, os.cpu_count() or 1)
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="default: 64")
    add(
        "-j",
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help=f"processes that decode; 0: threads of this one (default: {cores})",
    )
    add(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about a picture that cannot be read; skip lists it (default: stop)",
    )
    add("--output", type=Path, metavar="FILE.json", help="write the results")
    add(
        "--predictions",
        type=Path,
        metavar="FILE.npz",
        help="write paths, labels, logits and top1 of every picture",
    )
    verify = "repeat the evaluation that wrote this file, and compare; exit status 1 if it differs"
    add("--verify", type=Path, metavar="FILE.json", help=verify)
    add("--overwrite", action="store_true", help="let the two replace files that exist")
    resume = "go on with an evaluation that was stopped or killed, by the command that began it"
    add("--resume", action="store_true", help=resume)
