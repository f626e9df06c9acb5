"""`python -m hvit_jax.train`: train a vision transformer on a folder of pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hvit_jax.command_line import ArgumentParser, run
from hvit_jax.errors import InputError
from hvit_jax.method_options import numbers, parse_with_method
from hvit_jax.training.run import train
from hvit_jax.training.start import SIZES

RESOLUTION = ("-r", "--resolution")
RECIPE = (
    ("--epochs", float, 10.0, "passes over the pictures"),
    ("--learning-rate", float, 1e-3, "highest rate of AdamW"),
    ("--weight-decay", float, 0.05, "of weight matrices"),
    ("--label-smoothing", float, 0.1, "share of the target spread over all classes"),
    ("--crop-scale", float, 0.35, "least share of the picture's area in a crop"),
    ("--seed", int, 0, "of weights, order and augmentation"),
    ("--log-every", int, 50, "steps between two rows of metrics.csv"),
    ("--save-every", int, 500, "steps between two saved states"),
)


def make_parser() -> ArgumentParser:
    """Declare the command's options, those of the method excepted."""
    parser = ArgumentParser(
        prog="python -m hvit_jax.train",
        description="Train or fine-tune a vision transformer on class folders of pictures. "
        "The result, OUTPUT/checkpoint, loads with hvit_jax.load and eval.py.",
    )
    add = parser.add_argument
    add("data", metavar="DATA", help="class folders, or a folder whose train/ holds them")
    add("--output", required=True, metavar="DIR", help="where state, metrics and result go")
    add("--resume", action="store_true", help="go on from the newest state in OUTPUT")
    start = parser.add_argument_group("model: from a checkpoint, a name, or sizes")
    start.add_argument("--checkpoint", metavar="DIR", help="start from these weights")
    start.add_argument("--model", metavar="NAME", help="vit_b16, vit_l16 or vit_h14, random")
    for name in SIZES:
        flag = "--" + name.replace("_", "-")
        start.add_argument(flag, type=int, metavar="N", help="for a model of your own")
    help = "pixels, one number or height and width (default: the checkpoint's or the name's)"
    start.add_argument(*RESOLUTION, type=numbers, metavar="N [N]", help=help)
    _add_recipe(parser)
    return parser


def _add_recipe(parser: ArgumentParser) -> None:
    add = parser.add_argument_group("recipe").add_argument
    for flag, kind, default, help in RECIPE:
        add(flag, type=kind, default=default, metavar="X", help=f"{help} (default: {default})")
    warmup = "linear warm-up, then cosine to 0 (default: a tenth of the epochs, at most 1)"
    add("--warmup-epochs", type=float, metavar="X", help=warmup)
    flip = argparse.BooleanOptionalAction
    add("--flip", action=flip, default=True, help="mirror every other picture (default)")
    size = "pictures in a step (default: 128)"
    add("-b", "--batch-size", type=int, default=128, metavar="N", help=size)
    workers = "processes that decode pictures (default: 0, threads of this one)"
    add("-j", "--workers", type=int, default=0, metavar="N", help=workers)
    dtypes = "what blocks are computed in; weights stay in float32 (default: float32)"
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtypes)


def _check(options: argparse.Namespace) -> None:
    """Fill in the warm-up, and refuse numbers outside their range."""
    if options.warmup_epochs is None:
        options.warmup_epochs = min(1.0, options.epochs / 10)
    ranges = {
        "epochs": (1e-9, None),
        "learning_rate": (1e-12, None),
        "weight_decay": (0, None),
        "warmup_epochs": (0, options.epochs),
        "label_smoothing": (0, 0.999),
        "crop_scale": (0.001, 1),
        "log_every": (1, None),
        "save_every": (1, None),
        "batch_size": (1, None),
        "workers": (0, None),
        "seed": (0, 2**32 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= (sys.maxsize if high is None else high):
            upper = "" if high is None else f" and at most {high}"
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value} must be at least {low}{upper}, and finite")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""

    def command() -> None:
        words = sys.argv[1:] if argv is None else argv
        options, reducer = parse_with_method(make_parser(), words, list_flags=RESOLUTION)
        _check(options)
        train(options, reducer)

    return run(command, "hvit_jax.train")
