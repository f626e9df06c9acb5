"""The command line of `hvit sweep`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax.api import DTYPES
from hvit_jax.commands.method_options import join_numbers, numbers
from hvit_jax.config import as_pair
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import data_and_checkpoint
from hvit_jax.ops.fused_attention import IMPLEMENTATIONS
from hvit_jax.reducers import REDUCERS
from hvit_jax.sweeping.choice import Goal
from hvit_jax.sweeping.grid import DENSE
from hvit_jax.system.figures import check_plot
from hvit_jax.system.run import ArgumentParser

PROGRAM = "hvit sweep"
_DESCRIPTION = """Try settings of all methods on a sample of your pictures, on all devices of this
machine, beside the dense model; print the Pareto front of accuracy and speed, and name the setting
to use. Without DATA and --checkpoint it tries them on the bundled demo."""


@dataclass(frozen=True)
class Options:
    """What to try, and how.

    Attributes:
        data: a folder or `tfds:NAME[:SPLIT]`.
        checkpoint: a checkpoint's folder.
        demo: whether the two are the demo's.
        methods: names of the methods to try.
        goal: what is wanted; None to see the front only.
        everything: whether to try what the goal makes hopeless, too.
        pictures: size of the sample.
        resolution: height and width in pixels; None for the checkpoint's own.
        batch_size: pictures at once, of all devices together.
        workers: processes that decode.
        dtype: "float32" or "bfloat16".
        attention: "auto", "cudnn" or "xla".
        seconds: how long one round of timing takes, about.
        cache: whether to keep compiled programs on disk.
        output: a file that every finished candidate is written to.
        resume: whether to go on with that file.
        plot: a picture to draw.
    """

    data: str
    checkpoint: str
    demo: bool
    methods: tuple[str, ...]
    goal: Goal | None
    everything: bool
    pictures: int
    resolution: tuple[int, int] | None
    batch_size: int
    workers: int
    dtype: str
    attention: str
    seconds: float
    cache: bool
    output: Path | None
    resume: bool
    plot: Path | None

    @property
    def model_options(self) -> dict[str, Any]:
        """Those options of `hvit_jax.load` that are not at their defaults."""
        given = {"resolution": self.resolution, "dtype": self.dtype, "attention": self.attention}
        defaults = (None, "float32", "auto")
        return {name: value for name, value in given.items() if value not in defaults}

    @property
    def model_words(self) -> list[str]:
        """The same, as `eval.py` reads them."""
        words = []
        for name, value in self.model_options.items():
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


def parse_options(arguments: Sequence[str]) -> Options:
    """Read a command line, without the program's name.

    Raises:
        InputError: for anything in it that is wrong.
    """
    given = _parser().parse_args(join_numbers(arguments, ("-r", "--resolution")))
    data, checkpoint = data_and_checkpoint(given.data, given.checkpoint, arguments)
    values = {
        **vars(given),
        "data": data,
        "checkpoint": checkpoint,
        "demo": given.data is None,
        "methods": tuple(filter(None, given.methods.replace(",", " ").split())),
        "goal": _goal(given),
        "resolution": None if given.resolution is None else as_pair(given.resolution),
    }
    for name in ("target_speedup", "max_drop"):
        del values[name]
    options = Options(**values)
    _check(options)
    return options


def _goal(given: argparse.Namespace) -> Goal | None:
    if given.target_speedup is None and given.max_drop is None:
        return None
    if given.target_speedup is not None and not 1 < given.target_speedup < 1000:
        raise InputError(f"--target-speedup must be above 1, got {given.target_speedup:g}")
    if given.max_drop is not None and not 0 <= given.max_drop <= 100:
        raise InputError(f"--max-drop must be from 0 to 100, got {given.max_drop:g}")
    return Goal(given.target_speedup, given.max_drop)


def _check(options: Options) -> None:
    """Find mistakes before the work starts; unknown methods are found with the candidates."""
    for name, least in (("pictures", 2), ("batch_size", 1), ("workers", 0)):
        if getattr(options, name) < least:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} must be at least {least}, got {getattr(options, name)}")
    if not options.methods:
        raise InputError("--methods names no method; give some of them, such as tome,evit")
    if not 0 < options.seconds < 3600:
        raise InputError(f"--seconds must be above 0 and below 3600, got {options.seconds:g}")
    if options.output is not None and options.output.suffix != ".json":
        raise InputError(f"--output takes a .json file, got {options.output}")
    if options.resume and options.output is None:
        raise InputError("--resume needs --output FILE.json, whose candidates it goes on with")
    if options.plot is not None:
        check_plot(options.plot, "--plot")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    _add_what(parser)
    _add_how(parser)
    return parser


def _add_what(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("data", nargs="?", metavar="DATA", help="a folder of class folders, or tfds:NAME[:SPLIT]")
    add("--checkpoint", metavar="DIR", help="a folder written by hvit convert or by training")
    wanted = parser.add_mutually_exclusive_group()
    speed = "name the most accurate setting with at least X times the dense model's images/s"
    wanted.add_argument("--target-speedup", type=float, metavar="X", help=speed)
    drop = "name the fastest setting that loses at most so many percentage points of top-1"
    wanted.add_argument("--max-drop", type=float, metavar="POINTS", help=drop)
    known = ",".join(name for name in REDUCERS if name != DENSE)
    add("--methods", default=known, metavar="LIST", help=f"default: {known}")
    everything = "try also what GFLOPs make hopeless, which otherwise is skipped, and counted"
    add("--all", dest="everything", action="store_true", help=everything)
    pictures = "sample of DATA, spread over it and so over its classes (default: 1000)"
    add("--pictures", type=int, default=1000, metavar="N", help=pictures)
    output = "write every candidate as soon as it is finished"
    add("--output", type=Path, metavar="FILE.json", help=output)
    add("--resume", action="store_true", help="go on with the candidates of --output")
    add("--plot", type=Path, metavar="FILE.png", help="draw accuracy against speed")


def _add_how(parser: ArgumentParser) -> None:
    add, cores = parser.add_argument, min(8, os.cpu_count() or 1)
    size = "picture size, one number or height and width (default: the checkpoint's)"
    add("-r", "--resolution", type=numbers, metavar="N [N]", help=size)
    size = "pictures at once, of all devices together (default: 32)"
    add("-b", "--batch-size", type=int, default=32, metavar="N", help=size)
    workers = f"processes that decode; 0: threads of this one (default: {cores})"
    add("-j", "--workers", type=int, default=cores, metavar="N", help=workers)
    add("--dtype", choices=DTYPES[:2], default="float32", help="default: float32")
    add("--attention", choices=IMPLEMENTATIONS, default="auto", help="default: auto")
    seconds = "how long one of five rounds of timing takes, about (default: 0.5)"
    add("--seconds", type=float, default=0.5, metavar="S", help=seconds)
    cache = "do not keep compiled programs on disk (kept in ~/.cache/hvit_jax/xla)"
    add("--no-cache", dest="cache", action="store_false", help=cache)
