"""`hvit calibrate`: measure what budgets a method needs on your pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from hvit_jax.api import DTYPES, load, with_resolution
from hvit_jax.calibration.budgets import (
    BlockCounts,
    check_percentile,
    measure,
    propose,
    with_budgets,
)
from hvit_jax.checkpoint import describe_checkpoint, read_description
from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.commands.method_options import numbers, parse_with_method
from hvit_jax.config import ViTConfig, as_pair, model_name
from hvit_jax.costs import count_flops
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.loader import load_batches
from hvit_jax.data.source import Source, open_source
from hvit_jax.data.subset import SAMPLING, spread
from hvit_jax.errors import InputError
from hvit_jax.evaluation.inputs import data_and_checkpoint
from hvit_jax.ops.fused_attention import IMPLEMENTATIONS
from hvit_jax.reducers import Reducer
from hvit_jax.system.files import new_file, refuse_existing
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.system.run import run

PROGRAM = "hvit calibrate"
_DESCRIPTION = """Measure, block by block, how many tokens (ats) or clusters (act) your pictures
need, and propose budgets for them. Without DATA and --checkpoint it measures the bundled demo."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit status.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    options, reducer = parse_with_method(
        _parser(), arguments, default="ats", list_flags=("-r", "--resolution")
    )
    options.data, options.checkpoint = data_and_checkpoint(
        options.data, options.checkpoint, arguments
    )
    if options.resolution is not None:
        options.resolution = as_pair(options.resolution)
    config = with_resolution(read_description(options.checkpoint).config, options.resolution)
    _check(reducer, config, options)
    pictures = open_source(options.data)
    source = spread(pictures, options.batches * options.batch_size)
    counts = _measure(source, reducer, config, options)
    share, common = options.percentile, options.common
    proposed = propose(reducer, config, counts, percentile=share, common=common)
    about = {
        **_about(options, reducer, config, pictures),
        "pictures": len(source),
        "blocks": [entry.summary(share) for entry in counts],
    }
    _print(reducer, proposed, config, about)
    if options.output is not None:
        _write(options.output, proposed, about)
        print(f"written: {options.output}")


def _about(
    options: argparse.Namespace, reducer: Reducer, config: ViTConfig, pictures: Source
) -> dict[str, Any]:
    """Name what the counts depend on."""
    names = ("checkpoint", "data", "batch_size", "dtype", "attention", "percentile", "common")
    return {
        **describe_runtime(),
        **{name: getattr(options, name) for name in names},
        **describe_checkpoint(options.checkpoint),
        "data_sha256": data_sha256(pictures),
        "sampling": SAMPLING,
        "args": reducer.options(),
        "model": model_name(config),
        "resolution": list(config.image_shape),
    }


def _measure(
    source: Source, reducer: Reducer, config: ViTConfig, options: argparse.Namespace
) -> list[BlockCounts]:
    model = load(
        options.checkpoint,
        reducer,
        resolution=options.resolution,
        dtype=options.dtype,
        attention=options.attention,
    )
    size, workers = min(options.batch_size, len(source)), options.workers
    total = -(-len(source) // size)
    with load_batches(source, config.image_shape, batch_size=size, workers=workers) as batches:
        console = Console(stderr=True)
        hidden = not console.is_terminal
        shown = track(batches, "measuring", total, console=console, disable=hidden)
        with explain_out_of_memory(size, smaller_batch(size)):
            return measure(model, shown, batch_size=size)


def _check(reducer: Reducer, config: ViTConfig, options: argparse.Namespace) -> None:
    """Find mistakes before the work starts."""
    if options.output is not None:
        refuse_existing(options.output)
    for name in ("batches", "batch_size"):
        if getattr(options, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} must be at least 1, got {getattr(options, name)}")
    check_percentile(options.percentile)
    # Any budgets will do to see whether the other options leave room for them.
    with_budgets(reducer, 2).resolve(config)
    if getattr(reducer, reducer.budget_option or "") is not None:
        flag = "--" + str(reducer.budget_option).replace("_", "-")
        raise InputError(f"{flag} is what this command measures; leave it out")
    if not reducer.resolve(config).budget_blocks(config):
        raise InputError(f"{reducer.name} has nothing to measure with these options")


def _print(reducer: Reducer, proposed: Reducer, config: ViTConfig, about: dict[str, Any]) -> None:
    option = proposed.budget_option or ""
    listed = proposed.options()[option]
    budgets = dict(zip(proposed.budget_blocks(config), listed, strict=True))
    size = "x".join(map(str, config.image_shape))
    print(f"{proposed.name} on {about['pictures']} pictures, {about['model']} at {size}")
    share = f"{about['percentile']:g} %"
    print(f"block {'counted':>10} {'mean':>8} {'median':>8} {share:>8} {'max':>8} {'budget':>8}")
    for row in about["blocks"]:
        print(
            f"{row['block']:>5} {row['counted']:>10} {row['mean']:>8.1f} {row['median']:>8.1f} "
            f"{row['percentile']:>8} {row['max']:>8} {budgets[row['block']]:>8}"
        )
    before, after = (count_flops(config, each) / 1e9 for each in (reducer, proposed))
    print(f"GFLOPs a picture (tables' convention): {before:.3f} without budgets, {after:.3f} with")
    print(f"use: --{option.replace('_', '-')} {' '.join(map(str, listed))}")


def _write(path: Path, proposed: Reducer, about: dict[str, Any]) -> None:
    content = {"method": proposed.name, "args": proposed.options(), "measured": about}
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    add, cores = parser.add_argument, min(8, os.cpu_count() or 1)
    add("data", nargs="?", metavar="DATA", help="a folder of class folders, or tfds:NAME[:SPLIT]")
    add("--checkpoint", metavar="DIR", help="a folder written by hvit convert or by training")
    size = "picture size, one number or height and width (default: the checkpoint's)"
    add("-r", "--resolution", type=numbers, metavar="N [N]", help=size)
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--attention", choices=IMPLEMENTATIONS, default="auto", help="default: auto")
    add("-b", "--batch-size", type=int, default=32, metavar="N", help="default: 32")
    spread_help = "how many batches to measure, spread over DATA (default: 8)"
    add("--batches", type=int, default=8, metavar="N", help=spread_help)
    workers = f"processes that decode; 0: threads of this one (default: {cores})"
    add("-j", "--workers", type=int, default=cores, metavar="N", help=workers)
    share = "budgets suffice for this share of the pictures, in per cent (default: 99)"
    add("--percentile", type=float, default=99.0, metavar="P", help=share)
    one = "one budget for all blocks, the largest: more work a picture, but far less to compile"
    add("--common", action="store_true", help=one)
    add("--output", type=Path, metavar="FILE.json", help="write budgets and measurements")
    return parser


if __name__ == "__main__":
    sys.exit(main())
