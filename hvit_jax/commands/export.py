"""`hvit export`: write a model as a program that runs without this package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hvit_jax import demo
from hvit_jax.api import DTYPES, load, with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.commands.method_options import numbers, parse_with_method
from hvit_jax.config import as_pair
from hvit_jax.errors import InputError, unknown
from hvit_jax.evaluation.report import describe
from hvit_jax.evaluation.results import describe_model
from hvit_jax.exporting.folder import LOADER, Target, write_export
from hvit_jax.exporting.program import PLATFORMS
from hvit_jax.system.files import refuse_existing
from hvit_jax.system.run import run

PROGRAM = "hvit export"
_DESCRIPTION = """Write a checkpoint under a method as jax.export programs, with weights, the values
that pictures are prepared with, and a loader that needs neither this package nor Flax. Without
--checkpoint it exports the bundled demo."""
_SYMBOLIC = "symbolic"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit status.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    options, reducer = parse_with_method(_parser(), arguments, list_flags=("-r", "--resolution"))
    target = _target(options)
    refuse_existing(options.output)
    checkpoint = options.checkpoint or str(demo.checkpoint_dir())
    resolution = None if options.resolution is None else as_pair(options.resolution)
    reducer.resolve(with_resolution(read_description(checkpoint).config, resolution))
    # JAX gives no guarantee for programs that call cuDNN, and makes them on NVIDIA GPUs only.
    model = load(checkpoint, reducer, resolution=resolution, dtype=options.dtype, attention="xla")
    write_export(options.output, model, checkpoint, target)
    batch = "any batch" if target.batch is None else f"batches of {target.batch}"
    about = describe_model(model) | {"device": " and ".join(target.platforms)}
    print(f"exported: {describe(about)}; {batch}")
    print(f"run it: python {options.output / LOADER} PICTURE ...")


def _target(options: argparse.Namespace) -> Target:
    platforms = tuple(dict.fromkeys(options.platforms))
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown("platform", platform, PLATFORMS)
    word = options.batch
    if word != _SYMBOLIC and not (word.isdecimal() and int(word) > 0):
        raise InputError(f"--batch must be {_SYMBOLIC} or a number of at least 1, got {word!r}")
    batch = None if word == _SYMBOLIC else int(word)
    return Target(platforms, batch, options.weights == "inside")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="a folder written by hvit convert or by training")
    size = "picture size, one number or height and width (default: the checkpoint's)"
    add("-r", "--resolution", type=numbers, metavar="N [N]", help=size)
    add("--dtype", choices=DTYPES[:2], default="float32", help="default: float32")
    platforms = f"{', '.join(PLATFORMS)}; this machine needs not have them (default: cpu cuda)"
    add("--platforms", nargs="+", default=["cpu", "cuda"], metavar="NAME", help=platforms)
    batch = f"pictures at once, or {_SYMBOLIC} for any number (default: {_SYMBOLIC})"
    add("--batch", default=_SYMBOLIC, metavar=f"{_SYMBOLIC}|N", help=batch)
    weights = "inside the programs, or once in a file beside them (default: beside)"
    add("--weights", choices=("beside", "inside"), default="beside", help=weights)
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
