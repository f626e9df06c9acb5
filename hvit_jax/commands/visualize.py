"""`hvit visualize`: pictures of what a method does with a picture's patches."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import track

from hvit_jax import demo
from hvit_jax.api import load, with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.commands.method_options import join_numbers, numbers, parse_with_method
from hvit_jax.config import ViTConfig, as_pair
from hvit_jax.costs import at_cost, cost_share
from hvit_jax.data.folder import open_picture
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.errors import InputError
from hvit_jax.reducers import REDUCERS, Reducer
from hvit_jax.system.plotting import check_plot
from hvit_jax.system.run import run
from hvit_jax.visualization.draw import draw_groups, enlarged, heat_map, lay_over
from hvit_jax.visualization.figure import Panel, draw_figure
from hvit_jax.visualization.view import compile_views

PROGRAM = "hvit visualize"
_DESCRIPTION = """Draw which patches of a picture a method treats as one: groups in their mean
colour with outlines, dropped patches dark, and what CLS attends to as a heat map. Without
--checkpoint the bundled demo's model looks at the pictures; -r 128 gives it 32 x 32 patches. For
act and smyrf, which keep all tokens, the groups are those of the queries in the first head."""
SHARE = 0.6
_LISTS = ("-r", "--resolution", "--after")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit status.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> None:
    options, reducer = _parse(arguments)
    check_plot(options.output, "--output")
    if options.resolution is not None:
        options.resolution = as_pair(options.resolution)
    config = with_resolution(read_description(options.checkpoint).config, options.resolution)
    blocks = _blocks(options, config)
    reducers = _reducers(options, config, reducer)
    pictures = [open_picture(Path(name), name) for name in options.images]
    large = enlarged(config.image_shape)
    shown = [resize_and_crop(picture, large) for picture in pictures]
    seen = [resize_and_crop(picture, config.image_shape) for picture in pictures]
    columns = _columns(options, reducers, blocks, shown, seen)
    rows = list(zip([Panel("picture", picture) for picture in shown], *columns, strict=True))
    draw_figure(rows, options.output, title=_title(options, config, reducers))
    print(f"written: {options.output}")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Reducer]:
    """Read the command line; a comparison takes no options of a method."""
    parser = _parser()
    if "--compare" not in arguments:
        return parse_with_method(parser, arguments, default="hourglass", list_flags=_LISTS)
    options, surplus = parser.parse_known_args(join_numbers(arguments, _LISTS))
    if surplus:
        flag = surplus[0].partition("=")[0]
        raise InputError(f"--compare draws all methods at --share; leave {flag} out")
    return options, Reducer()


def _reducers(options: argparse.Namespace, config: ViTConfig, reducer: Reducer) -> list[Reducer]:
    """Choose what to draw: the method asked for, or all of them."""
    if not options.compare:
        if options.share is not None:
            raise InputError("--share is for --compare; leave it out, or give the method's options")
        return [reducer.resolve(config)]
    options.share = SHARE if options.share is None else options.share
    names = [name for name in REDUCERS if name != Reducer.name]
    return [at_cost(name, config, options.share) for name in names]


def _blocks(options: argparse.Namespace, config: ViTConfig) -> tuple[int, ...]:
    """Choose the blocks to look behind: those asked for, or the ends of three thirds."""
    last = config.depth - 1
    given = options.after
    if given is None:
        thirds = sorted({max(0, config.depth * part // 3 - 1) for part in (1, 2, 3)})
        return (last,) if options.compare else tuple(thirds)
    given = given if isinstance(given, tuple) else (given,)
    if not all(isinstance(block, int) and 0 <= block <= last for block in given):
        shown = " ".join(map(str, given))
        raise InputError(f"--after {shown}: the model's blocks are 0 to {last}")
    if options.compare and len(given) != 1:
        raise InputError(f"--compare looks behind one block; --after names {len(given)}")
    return given


def _columns(
    options: argparse.Namespace,
    reducers: Sequence[Reducer],
    blocks: Sequence[int],
    shown: Sequence[UInt8[np.ndarray, "H W 3"]],
    seen: Sequence[UInt8[np.ndarray, "h w 3"]],
) -> Iterator[list[Panel]]:
    """Draw the columns behind the first: a panel for every picture, shown larger than seen."""
    console = Console(stderr=True)
    for reducer in track(reducers, "methods", console=console, disable=len(reducers) == 1):
        model = load(options.checkpoint, reducer, resolution=options.resolution)
        compiled, grid = compile_views(model, blocks), model.config.grid
        views = [jax.device_get(compiled(picture[None])[0]) for picture in seen]
        for place, block in enumerate(blocks):
            title = f"block {block}, {_span([int(view[place].tokens[0]) for view in views])} tokens"
            if options.compare:
                share = cost_share(model.config, reducer)
                title = f"{reducer.name}\n{share:.2f} x GFLOPs\n{title}"
            yield [
                Panel(title, draw_groups(picture, view[place].groups[0], grid))
                for picture, view in zip(shown, views, strict=True)
            ]
        if not options.compare:
            title = f"attention of CLS, block {blocks[-1]}"
            heats = [heat_map(view[-1].attention[0], grid, shown[0].shape[:2]) for view in views]
            yield [Panel(title, lay_over(*pair)) for pair in zip(shown, heats, strict=True)]


def _span(counts: Sequence[int]) -> str:
    """Write counts of several pictures, which may differ."""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _title(options: argparse.Namespace, config: ViTConfig, reducers: Sequence[Reducer]) -> str:
    rows, columns = config.grid
    if options.compare:
        return (
            f"All methods near {options.share:g} x the GFLOPs of dense, {rows} x {columns} patches"
        )
    share = cost_share(config, reducers[0])
    return f"{reducers[0].name}, {share:.2f} x the GFLOPs of dense, {rows} x {columns} patches"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=_DESCRIPTION)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="pictures, a row each")
    help = "a file that ends in .png, .jpg, .svg or .pdf; replaced if it exists"
    add("-o", "--output", type=Path, required=True, metavar="FILE", help=help)
    help = "a folder written by hvit convert or by training (default: the bundled demo)"
    add("--checkpoint", default=str(demo.checkpoint_dir()), metavar="DIR", help=help)
    size = "picture size, one number or height and width (default: the checkpoint's)"
    add("-r", "--resolution", type=numbers, metavar="N [N]", help=size)
    help = "look behind these blocks, counted from 0 (default: a third, two thirds, the last)"
    add("--after", type=numbers, metavar="N [N ...]", help=help)
    help = "draw all methods behind one block, each at the strength nearest to --share"
    add("--compare", action="store_true", help=help)
    help = f"with --compare: share of the dense model's GFLOPs (default: {SHARE:g})"
    add("--share", type=float, metavar="X", help=help)
    return parser
