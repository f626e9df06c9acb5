"""The command `hvit convert`, also `python -m convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress

from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.config import ViTConfig, model_name
from hvit_jax.convert.detect import published_heads
from hvit_jax.convert.keys import SWAG
from hvit_jax.convert.tasks import convert_file, export_file
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import abstract_parameters, count_parameters
from hvit_jax.system.run import run

PROGRAM = "hvit convert"
EPILOG = """\
examples:
  hvit convert vit_b16_in1k.torch vit_b16.jax
  hvit convert small.pth small.jax --heads 4
  hvit convert --to-torch tuned.jax tuned.torch

Read are state dicts of SWAG (.torch) and of torchvision's vit_b_16, vit_l_16
and vit_h_14 (.pth), with or without a head, told apart by their keys. Half
precision is widened to float32. Nothing inside a file is run, and nothing is
written before every key has been found, used once and converted back.

SWAG's files: https://dl.fbaipublicfiles.com/SWAG/NAME.torch, where NAME is
vit_b16_in1k, vit_l16_in1k or vit_h14_in1k, or without _in1k (no head).
Their weights are licensed CC-BY-NC 4.0.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; None: those of the process.

    Returns:
        The exit status.
    """
    return run(lambda: _main(argv), PROGRAM)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Convert a PyTorch checkpoint of a SWAG vision transformer for hvit_jax.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SRC", help="the .torch or .pth file (with --to-torch: the folder)"
    )
    parser.add_argument(
        "destination", metavar="DST", help="the folder to write (with --to-torch: the .torch file)"
    )
    parser.add_argument(
        "--heads",
        type=int,
        metavar="N",
        help="attention heads; needed only for sizes other than vit_b16, vit_l16 and vit_h14",
    )
    parser.add_argument(
        "--to-torch",
        action="store_true",
        help="the other way: write the checkpoint SRC as a state dict in SWAG's format",
    )
    return parser


def _main(argv: Sequence[str] | None) -> None:
    arguments = _parser().parse_args(argv)
    if arguments.to_torch and arguments.heads is not None:
        raise InputError("--heads is for reading PyTorch files; with --to-torch it has no meaning")
    jax.config.update("jax_platforms", "cpu")  # An accelerator's memory is left to others.
    source, destination = arguments.source, arguments.destination
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        if arguments.to_torch:
            config = export_file(source, destination, progress=progress).config
            facts = {"source": source, "format": SWAG.name, **_export_note(config)}
        else:
            description = convert_file(
                source, destination, heads=arguments.heads, progress=progress
            )
            config = description.config
            facts = {**description.source, "file": source, **_heads_note(config)}
    print(summary(config, Path(destination), facts))


def _heads_note(config: ViTConfig) -> dict[str, str]:
    usual = published_heads(depth=config.depth, width=config.width, mlp_width=config.mlp_width)
    if usual in (None, config.heads):
        return {}
    return {"note": f"the published model of this size has {usual} heads, not {config.heads}"}


def _export_note(config: ViTConfig) -> dict[str, str]:
    rows, columns = config.grid
    if rows == columns:
        return {}
    return {"note": f"a .torch file does not tell that the patches form {rows} rows x {columns}"}


def summary(config: ViTConfig, destination: Path, facts: dict[str, str]) -> str:
    """Describe in a few lines what was written.

    Args:
        config: the model's sizes.
        destination: the file or folder that was written.
        facts: more rows, by name.
    """
    files = [destination, *destination.rglob("*")]
    megabytes = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    rows = {
        "model": f"{model_name(config)}: {config.depth} blocks, width {config.width}, "
        f"{config.heads} heads, MLP width {config.mlp_width}, patch size {config.patch_size}",
        "resolution": "{} x {} pixels, ".format(*config.image_shape)
        + "{} x {} patches".format(*config.grid),
        "classes": f"{config.num_classes}" if config.num_classes else "none, no head",
        "parameters": f"{count_parameters(abstract_parameters(config)):,}",
        **facts,
        "checked": "every key used once, nothing missing, converts back to the same bits",
        "licence": "SWAG's weights, and what is tuned from them, are CC-BY-NC 4.0",
    }
    lines = [f"  {name:<10}  {value}" for name, value in rows.items()]
    return "\n".join([f"wrote {destination} ({megabytes:,.1f} MB)", *lines])
