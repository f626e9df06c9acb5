"""`hvit train`: train a vision transformer on a folder of pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.commands.method_options import numbers, parse_with_method
from hvit_jax.distributed.processes import add_process_options, find_processes
from hvit_jax.distributed.together import run_together
from hvit_jax.errors import InputError
from hvit_jax.system.run import run
from hvit_jax.training.run import train
from hvit_jax.training.start import SIZES
from hvit_jax.training.trainer import PARTS

PROGRAM = "hvit_jax.train"
RESOLUTION = ("-r", "--resolution")
# Flag, type, default, least and largest value, help.
RECIPE = (
    ("--epochs", float, 10.0, 1e-9, None, "passes over the pictures"),
    ("--learning-rate", float, 1e-3, 1e-12, None, "highest rate of AdamW"),
    ("--layer-decay", float, 1.0, 1e-3, 1, "rate of a layer, relative to the one above it"),
    ("--weight-decay", float, 0.05, 0, None, "of weight matrices"),
    ("--label-smoothing", float, 0.1, 0, 0.999, "share of the target spread over all classes"),
    ("--crop-scale", float, 0.35, 0.001, 1, "least share of the picture's area in a crop"),
    ("--ema", float, 0.0, 0, 0.999999, "decay of the moving average that is kept; 0: none"),
    ("--seed", int, 0, 0, 2**32 - 1, "of weights, order and augmentation"),
)
RUNNING = (
    ("--accumulate", int, 1, 1, None, "parts that a step takes its batch in, to save memory"),
    ("--workers", int, 0, 0, None, "processes that decode pictures; 0: threads of this one"),
    ("--log-every", int, 50, 1, None, "steps between two rows of metrics.csv"),
    ("--save-every", int, 500, 1, None, "steps between two saved states"),
    ("--val-every", float, 1.0, 1e-9, None, "epochs between two validations"),
)
SHORT = {"--batch-size": "-b", "--workers": "-j"}
SIZE = ("--batch-size", int, 128, 1, None, "pictures in a step, of all devices together")
_DESCRIPTION = """Train or fine-tune a vision transformer on class folders of pictures, on all
devices of this machine. OUTPUT/checkpoint, the result, loads with hvit_jax.load and eval.py;
OUTPUT/metrics.csv and validation.csv have the run's numbers. A run that was stopped or killed goes
on from its newest state with the same command and --resume. Recipes: docs/training.md."""


def make_parser() -> ArgumentParser:
    """Declare the command's options, those of the method excepted."""
    parser = ArgumentParser(prog="hvit train", description=_DESCRIPTION)
    add = parser.add_argument
    add("data", metavar="DATA", help="class folders, or a folder whose train/ holds them")
    add("--output", required=True, metavar="DIR", help="where state, metrics and result go")
    add("--resume", action="store_true", help="go on from the newest state in OUTPUT")
    start = parser.add_argument_group("model: from a checkpoint, a name, or sizes")
    start.add_argument("--checkpoint", metavar="DIR", help="start from these weights")
    head = "with --checkpoint: draw the head anew, also where it fits the number of classes"
    start.add_argument("--new-head", action="store_true", help=head)
    start.add_argument("--model", metavar="NAME", help="vit_b16, vit_l16 or vit_h14, random")
    for name in SIZES:
        flag = "--" + name.replace("_", "-")
        start.add_argument(flag, type=int, metavar="N", help="for a model of your own")
    help = "pixels, one number or height and width (default: the checkpoint's or the name's)"
    start.add_argument(*RESOLUTION, type=numbers, metavar="N [N]", help=help)
    _add_recipe(parser)
    _add_running(parser)
    add_process_options(parser)
    return parser


def _add_recipe(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    part = "what is trained; the head alone is cheap, the rest then stays as it is (default: whole)"
    group.add_argument("--train", choices=PARTS, default="whole", help=part)
    _add_numbers(group, (SIZE, *RECIPE))
    warmup = "linear warm-up, then cosine to 0 (default: a tenth of the epochs, at most 1)"
    group.add_argument("--warmup-epochs", type=float, metavar="X", help=warmup)
    flip = argparse.BooleanOptionalAction
    group.add_argument("--flip", action=flip, default=True, help="mirror every other picture")
    dtypes = "what blocks are computed in; weights stay in float32 (default: float32)"
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtypes)


def _add_running(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    _add_numbers(group, RUNNING)
    remat = "compute blocks again in the backward pass: less memory, about a third more time"
    group.add_argument("--remat", action="store_true", help=remat)
    shard = "divide parameters and optimiser among the devices, instead of a copy on each"
    group.add_argument("--shard-parameters", action="store_true", help=shard)
    val = "pictures to validate on, as eval.py takes them, or none (default: DATA's val/, if any)"
    group.add_argument("--val", metavar="DATA", help=val)
    board = "also write OUTPUT/tensorboard; needs pip install 'hvit-jax[tensorboard]'"
    group.add_argument("--tensorboard", action="store_true", help=board)


def _add_numbers(group: argparse._ArgumentGroup, table: Sequence[tuple]) -> None:
    for flag, kind, default, _, _, help in table:
        flags = [SHORT[flag], flag] if flag in SHORT else [flag]
        help, metavar = f"{help} (default: {default})", "N" if kind is int else "X"
        group.add_argument(*flags, type=kind, default=default, metavar=metavar, help=help)


def _check(options: argparse.Namespace) -> None:
    """Fill in the warm-up, and refuse numbers outside their range."""
    if options.warmup_epochs is None:
        options.warmup_epochs = min(1.0, options.epochs / 10)
    warmup = ("--warmup-epochs", float, None, 0, options.epochs, "")
    for flag, _, _, low, high, _ in (SIZE, *RECIPE, *RUNNING, warmup):
        value = getattr(options, flag[2:].replace("-", "_"))
        if not low <= value <= (sys.maxsize if high is None else high):
            upper = "" if high is None else f" and at most {high}"
            raise InputError(f"{flag} {value} must be at least {low}{upper}, and finite")
    if options.train == "head" and options.layer_decay != 1:
        raise InputError("--layer-decay is about layers that --train head does not train")
    if options.train == "head" and options.remat:
        raise InputError("--remat saves nothing with --train head, which has no backward pass")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""

    def command() -> int | None:
        words = sys.argv[1:] if argv is None else argv
        options, reducer = parse_with_method(make_parser(), words, list_flags=RESOLUTION)
        _check(options)
        processes = find_processes(options)
        return run_together(lambda peers: train(options, reducer, peers), processes, PROGRAM)

    return run(command, PROGRAM)
