"""`python -m hvit_jax.train`: train a vision transformer on a folder of pictures."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import (
    Description,
    load_parameters,
    read_description,
    resize_parameters,
    save_checkpoint,
)
from hvit_jax.command_line import ArgumentParser, run
from hvit_jax.config import ViTConfig, named_config
from hvit_jax.data.folder import ImageFolder, read_folder
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, init_parameters
from hvit_jax.reducers import make_reducer
from hvit_jax.training.data import Augmentation, training_batches
from hvit_jax.training.loop import MetricsFile, StateFolder, Trainer, run_steps
from hvit_jax.training.optimizer import make_optimizer

SIZES = ("patch_size", "depth", "width", "heads", "mlp_width")


def make_parser() -> argparse.ArgumentParser:
    """Declare the command's options."""
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
    start.add_argument("-r", "--resolution", type=int, nargs="+", metavar="N", help="pixels")
    recipe = parser.add_argument_group("recipe")
    for flag, kind, default, help in (
        ("--epochs", float, 10.0, "passes over the pictures"),
        ("--learning-rate", float, 1e-3, "highest rate of AdamW"),
        ("--weight-decay", float, 0.05, "of weight matrices"),
        ("--warmup-epochs", float, 1.0, "linear warm-up, then cosine to 0"),
        ("--label-smoothing", float, 0.1, "share of the target over all classes"),
        ("--crop-scale", float, 0.35, "least share of the picture's area in a crop"),
        ("--seed", int, 0, "of weights, order and augmentation"),
        ("--log-every", int, 50, "steps between two rows of metrics.csv"),
        ("--save-every", int, 500, "steps between two saved states"),
    ):
        recipe.add_argument(
            flag, type=kind, default=default, metavar="X", help=f"{help} ({default})"
        )
    recipe.add_argument("-b", "--batch-size", type=int, default=128, metavar="N")
    recipe.add_argument("-j", "--workers", type=int, default=0, metavar="N", help="processes")
    recipe.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    recipe.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return run(lambda: _train(make_parser().parse_args(argv)), "hvit_jax.train")


def _train(options: argparse.Namespace) -> int:
    _check(options)
    folder = read_folder(options.data, splits=("train",))
    config, parameters = _start(options, len(folder.classes))
    output = _open_output(options, config)
    steps_per_epoch = len(folder) / options.batch_size
    total = max(1, round(options.epochs * steps_per_epoch))
    optimizer = make_optimizer(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=round(options.warmup_epochs * steps_per_epoch),
        total_steps=total,
    )
    trainer = Trainer(
        config, make_reducer("dense"), optimizer, options.dtype, options.label_smoothing
    )
    states = StateFolder(output / "state")
    state = trainer.init(parameters)
    if options.resume:
        state = states.restore(state) or state
    batches = training_batches(
        folder,
        Augmentation(config.image_shape, options.crop_scale, options.flip),
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.workers,
        first_step=int(state.step),
    )
    metrics = MetricsFile(output / "metrics.csv", int(state.step))
    console = Console()
    console.print(
        f"{len(folder)} pictures, {len(folder.classes)} classes; {total} steps of "
        f"{options.batch_size} from step {int(state.step)} on {jax.devices()[0].device_kind}"
    )
    try:
        with _progress(console) as progress:
            task = progress.add_task("train", total=total, completed=int(state.step), text="")

            def log(row: dict[str, Any]) -> None:
                metrics.write({**row, "epoch": round(row["step"] / steps_per_epoch, 3)})
                text = "loss {loss:.3f}  acc {accuracy:.3f}  {images_per_second:.0f} im/s"
                progress.update(task, completed=row["step"], text=text.format(**row))

            state = run_steps(
                trainer,
                state,
                batches,
                total_steps=total,
                log_every=options.log_every,
                save_every=options.save_every,
                save=states.save,
                log=log,
            )
        states.save(state)
    finally:
        states.close()
    _finish(options, config, state.parameters, folder, output)
    return 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn())


def _check(options: argparse.Namespace) -> None:
    for name, least in (("epochs", 0), ("learning_rate", 0), ("batch_size", 0), ("log_every", 0)):
        if not getattr(options, name) > least:
            raise InputError(f"--{name.replace('_', '-')} must be above {least}")
    for name, low, high in (("crop_scale", 0.0, 1.0), ("label_smoothing", 0.0, 1.0)):
        if not low <= getattr(options, name) <= high:
            raise InputError(f"--{name.replace('_', '-')} must be between {low} and {high}")


def _start(options: argparse.Namespace, classes: int) -> tuple[ViTConfig, Tree]:
    """Find the sizes and the first parameters; a head for other classes is drawn anew."""
    resolution = options.resolution
    if resolution is not None:
        resolution = resolution[0] if len(resolution) == 1 else tuple(resolution)
    sizes = {name: getattr(options, name) for name in SIZES}
    if bool(options.checkpoint) + bool(options.model) + any(sizes.values()) != 1:
        raise InputError("give one of --checkpoint, --model, or the sizes of a model of your own")
    if options.checkpoint:
        stored = read_description(options.checkpoint).config
        config = dataclasses.replace(with_resolution(stored, resolution), num_classes=classes)
        parameters = load_parameters(options.checkpoint, stored)
        if stored.num_classes != classes:
            fresh = init_parameters(dataclasses.replace(config, resolution=config.patch_size), options.seed)
            parameters["head"] = fresh["head"]
        return config, resize_parameters(parameters, stored, config)
    if options.model:
        config = with_resolution(named_config(options.model), resolution)
        config = dataclasses.replace(config, num_classes=classes)
    else:
        missing = [name for name, value in {**sizes, "resolution": resolution}.items() if not value]
        if missing:
            flags = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise InputError(f"a model of your own also needs {flags}")
        config = ViTConfig(resolution, **sizes, num_classes=classes)
    return config, init_parameters(config, options.seed)


def _open_output(options: argparse.Namespace, config: ViTConfig) -> Path:
    """Make the output folder, or check that it belongs to the run to be resumed."""
    output = Path(options.output)
    about = {
        key: value
        for key, value in vars(options).items()
        if key not in ("resume", "output", "workers", "log_every", "save_every")
    }
    text = json.dumps({"config": dataclasses.asdict(config), "options": about}, indent=2)
    settings = output / "settings.json"
    if not options.resume:
        if output.exists():
            raise InputError(f"{output} exists already; give --resume to go on, or another folder")
        output.mkdir(parents=True)
        settings.write_text(text + "\n", encoding="utf-8")
    elif not settings.is_file():
        raise InputError(f"{output} holds no run to resume; leave --resume out to begin one")
    elif json.loads(settings.read_text(encoding="utf-8")) != json.loads(text):
        raise InputError(f"{settings} differs from this command's options; repeat them to resume")
    return output


def _finish(
    options: argparse.Namespace,
    config: ViTConfig,
    parameters: Tree,
    folder: ImageFolder,
    output: Path,
) -> None:
    source = {"format": "hvit_jax.train", "data": str(options.data), "options": vars(options)}
    save_checkpoint(
        output / "checkpoint",
        jax.device_get(parameters),
        Description(config, source, folder.classes),
    )
    print(f"wrote {output / 'checkpoint'}")
