"""One training run: its folder, its settings, and what it leaves behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.config import ViTConfig
from hvit_jax.data.folder import ImageFolder, read_folder
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree
from hvit_jax.reducers import Reducer
from hvit_jax.training.data import Augmentation, training_batches
from hvit_jax.training.files import MetricsFile, StateFolder
from hvit_jax.training.loop import Trainer, TrainState, run_steps
from hvit_jax.training.optimizer import make_optimizer
from hvit_jax.training.start import first_parameters

# Options that a resumed run may change.
FREE = ("resume", "output", "workers", "log_every", "save_every", "method_args")


def train(options: argparse.Namespace, reducer: Reducer) -> None:
    """Train as the command line says, and write OUTPUT/checkpoint.

    Args:
        options: of `python -m hvit_jax.train`.
        reducer: the method to train under.

    Raises:
        InputError: for anything wrong with the data, the start, or the output folder.
    """
    folder = read_folder(options.data, splits=("train",))
    config, parameters = first_parameters(options, len(folder.classes))
    reducer = reducer.resolve(config)
    settings = _settings(options, config, reducer)
    output = _open_output(Path(options.output), settings, resume=options.resume)
    steps_per_epoch = len(folder) / options.batch_size
    total = max(1, round(options.epochs * steps_per_epoch))
    optimizer = make_optimizer(
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=round(options.warmup_epochs * steps_per_epoch),
        total_steps=total,
    )
    trainer = Trainer(config, reducer, optimizer, options.dtype, options.label_smoothing)
    states = StateFolder(output / "state")
    try:
        state = trainer.init(parameters)
        state = (options.resume and states.restore(state)) or state
        state = _run(options, trainer, folder, states, state, total, steps_per_epoch)
        states.save(state)
    except BaseException:
        states.close()
        if not states.saved():
            shutil.rmtree(output)  # Nothing to resume: leave the name to a corrected command.
        raise
    states.close()
    _finish(output, config, state.parameters, settings, folder)


def _run(
    options: argparse.Namespace,
    trainer: Trainer,
    folder: ImageFolder,
    states: StateFolder,
    state: TrainState,
    total: int,
    steps_per_epoch: float,
) -> TrainState:
    """Train with a progress bar, from the state's step on."""
    first = int(state.step)
    batches = training_batches(
        folder,
        Augmentation(trainer.config.image_shape, options.crop_scale, options.flip),
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.workers,
        first_step=first,
    )
    console = Console()
    console.print(
        f"{len(folder)} pictures, {len(folder.classes)} classes; {total} steps of "
        f"{options.batch_size} from step {first} on {jax.devices()[0].device_kind}"
    )
    metrics = MetricsFile(Path(options.output) / "metrics.csv", first)
    with _progress(console) as progress:
        task = progress.add_task("train", total=total, completed=first, text="")
        log = _logger(metrics, progress, task, steps_per_epoch)
        return run_steps(
            trainer,
            state,
            batches,
            total_steps=total,
            log_every=options.log_every,
            save_every=options.save_every,
            save=states.save,
            log=log,
        )


def _logger(
    metrics: MetricsFile, progress: Progress, task: Any, steps_per_epoch: float
) -> Callable[[dict[str, Any]], None]:
    text = "loss {loss:.3f}  accuracy {accuracy:.3f}  {images_per_second:.0f} images/s"

    def log(row: dict[str, Any]) -> None:
        metrics.write({**row, "epoch": round(row["step"] / steps_per_epoch, 3)})
        progress.update(task, completed=row["step"], text=text.format(**row))

    return log


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    text = TextColumn("{task.fields[text]}")
    return Progress(*columns, text, TimeRemainingColumn(), console=console)


def _settings(options: argparse.Namespace, config: ViTConfig, reducer: Reducer) -> dict[str, Any]:
    """Gather what a resumed run must share with the one that it goes on with."""
    fixed = {name: value for name, value in vars(options).items() if name not in FREE}
    method = {"name": reducer.name, "options": reducer.options()}
    settings = {"config": dataclasses.asdict(config), "method": method, "options": fixed}
    return json.loads(json.dumps(settings))


def _open_output(output: Path, settings: dict[str, Any], *, resume: bool) -> Path:
    """Make the output folder, or check that it belongs to the run to be resumed."""
    path = output / "settings.json"
    if not resume:
        if output.exists():
            raise InputError(f"{output} exists already; give --resume to go on, or another folder")
        output.mkdir(parents=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return output
    if not path.is_file():
        raise InputError(f"{output} holds no run to resume; leave --resume out to begin one")
    if (output / "checkpoint").exists():
        raise InputError(f"{output} is finished: {output / 'checkpoint'} is its result")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if before != settings:
        raise InputError(f"{_difference(before, settings)}; repeat the first command to resume")
    return output


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Name the settings that differ between the first command and this one."""
    changed = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for old, new in ((before[part], now[part]) for part in now)
        for name in new
        if old.get(name) != new.get(name)
    ]
    return "; ".join(changed) or "the settings differ"


def _finish(
    output: Path, config: ViTConfig, parameters: Tree, settings: dict[str, Any], folder: ImageFolder
) -> None:
    source = {"format": "hvit_jax.train", **{key: settings[key] for key in ("method", "options")}}
    description = Description(config, source, folder.classes)
    save_checkpoint(output / "checkpoint", jax.device_get(parameters), description)
    print(f"wrote {output / 'checkpoint'}")
