"""One training run, from reading the pictures to the trained checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.data.folder import ImageFolder, PictureError, read_folder
from hvit_jax.data.loader import WorkerLost
from hvit_jax.data.source import Source
from hvit_jax.distributed.gathering import check_same, gather
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree
from hvit_jax.ops.platform import compiler_options
from hvit_jax.system.files import remove_folder
from hvit_jax.system.library_messages import is_out_of_memory
from hvit_jax.system.memory import explain_out_of_memory
from hvit_jax.system.progress import Show, show_progress
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.data import training_batches
from hvit_jax.training.optimizer import make_optimizer
from hvit_jax.training.records import (
    MetricsRow,
    Records,
    ValidationRow,
    import_tensorboard,
)
from hvit_jax.training.settings import gather_settings, open_output, read_settings
from hvit_jax.training.start import first_parameters
from hvit_jax.training.states import StateFolder
from hvit_jax.training.stopping import StopRequest, stop_requests
from hvit_jax.training.trainer import Trainer, TrainState
from hvit_jax.training.validation import Validation, ends_epoch, find_pictures

Batches = Iterator[dict[str, np.ndarray]]


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        checkpoint: the folder of the trained model, for `hvit_jax.load`.
        steps: steps in all.
        metrics: the last row of metrics.csv.
        validation: the last row of validation.csv, if there was a validation.
    """

    checkpoint: Path
    steps: int
    metrics: MetricsRow
    validation: ValidationRow | None


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    batches: Callable[..., Batches] = training_batches,
) -> TrainResult:
    """Train, and write the trained model to OUTPUT/checkpoint.

    In several processes, all of them call this.

    Args:
        config: what to train, and how.
        console: where process 0 reports to; default: stdout.
        batches: makes the training batches; see `training_batches`.

    Raises:
        InputError: for anything wrong with the data, the start, or the output folder.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM, once the state is saved; a
            second one does not wait for that.
    """
    if config.tensorboard:
        import_tensorboard()  # Its lack is found before anything is computed.
    writes = jax.process_index() == 0
    console = console or Console(highlight=False, markup=False, soft_wrap=True, quiet=not writes)
    placement = place(shard=config.shard_parameters)
    _check_batch(config.batch_size, config.accumulate, placement.devices)
    folder = read_folder(config.data, splits=("train",))
    pictures = find_pictures(config.data, config.val, folder)
    model, parameters, note = first_parameters(config, folder.classes)
    optimizer = make_optimizer(config, len(folder))
    trainer = Trainer(config, model, config.reducer.resolve(model), optimizer, placement)
    _open_output(config, gather_settings(trainer, folder, pictures), placement)
    if note is not None:
        console.print(note)
    run = _Run(trainer, folder, pictures, console, batches)
    with explain_out_of_memory(config.batch_size, config.less_memory(placement.devices)):
        state = run.train(parameters)
    trained = placement.gather(trainer.result(state))
    checkpoint = config.output / "checkpoint"
    if writes:
        source = {"format": "hvit_jax.train", **read_settings(config.output)}
        del source["model"]
        save_checkpoint(checkpoint, trained, Description(model, source, folder.classes))
        console.print(f"wrote {checkpoint}")
    rows = run.records.last
    return TrainResult(checkpoint, run.total_steps, rows[MetricsRow], rows[ValidationRow])


def _open_output(config: TrainConfig, shared: dict[str, Any], placement: Placement) -> None:
    """Let process 0 make or check the output folder, which all of them share."""
    check_same(str(shared), resume=config.resume)
    if jax.process_index() == 0:
        runtime = {**describe_runtime(placement.devices), "processes": placement.processes}
        open_output(config.output, {**shared, **runtime}, resume=config.resume)
    gather(None)  # The others wait for it here.
    if not config.output.is_dir():
        raise InputError(
            f"{config.output} is not the folder that process 0 made; all need to see it"
        )


class _Run:
    """The steps of a run whose output folder is open."""

    records: Records

    def __init__(
        self,
        trainer: Trainer,
        folder: ImageFolder,
        pictures: Source | None,
        console: Console,
        batches: Callable[..., Batches],
    ):
        self.config = config = trainer.config
        self.trainer, self.placement = trainer, trainer.placement
        self.alone = self.placement.processes == 1
        self.folder, self.console, self.batches = folder, console, batches
        self.total_steps = config.total_steps(len(folder))
        self.validation = None
        if pictures is not None:
            self.validation = Validation(trainer, pictures, folder.classes)
        self.states = StateFolder(config.output / "state")
        self.logged, self.started = 0, time.perf_counter()  # The last row's step and time.

    def train(self, parameters: Tree) -> TrainState:
        """Train from the newest state in the output folder, or from the first parameters."""
        try:
            state = self.placement.shard_state(self.trainer.init(parameters))
            if self.config.resume:
                state = self.states.restore(state, note=self.console.print) or state
            return self._take_steps(state)
        except BaseException as error:
            saved = self._close_early(error)
            if not isinstance(error, KeyboardInterrupt) or error.args:
                raise
            rest = "--resume goes on from the newest saved state" if saved else "nothing was saved"
            raise type(error)(f"interrupted; {rest}") from error

    def _close_early(self, error: BaseException) -> bool:
        """Close the states of a run that ends early, and tell whether there are any."""
        try:
            if self.alone:  # With others it may wait for one that is gone.
                self.states.close()
        except InputError:
            # What came first is to be reported; but a stop promises that its state is saved.
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            saved = self.states.saved()
            if jax.process_index() == 0 and not saved:
                _remove(self.config.output)  # Leave the name to a corrected command.
        return saved

    def _take_steps(self, state: TrainState) -> TrainState:
        """Train until the last step, or until a signal: the state is then saved all the same."""
        config, step, total = self.config, int(state.step), self.total_steps
        self.console.print(self._summary(step))
        self.records = Records(config.output, step, tensorboard=config.tensorboard)
        take_step = self._compile(state)
        resolution = self.trainer.model_config.image_shape
        batches = self.batches(config, self.folder, resolution, step)
        with (
            stop_requests(self.placement) as stop,
            show_progress(self.console, total, step, unit="steps") as show,
        ):
            self._validate(state, step, stop, show)
            self.logged, self.started = step, time.perf_counter()
            while step < total and not stop.is_set():
                state = take_step(state, self._next(batches, state))
                step += 1
                if step == total or step % config.log_every == 0:
                    self._log(state, step, show)
                if step == total or step % config.save_every == 0:
                    self._save(state)
                self._validate(state, step, stop, show)
            if step < total:
                self._save(state)
            stopped = step < total or stop.is_set()
        self.records.close()
        self.states.close()
        if stopped:
            raise stop.exception(f"interrupted after step {step}; --resume goes on from there")
        return state

    def _compile(self, state: TrainState) -> Callable[[TrainState, dict], TrainState]:
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        options = {"out_shardings": layout, "compiler_options": compiler_options()}
        step = jax.jit(self.trainer.step, donate_argnums=0, **options)
        shard = self.placement.shard_batch
        return lambda state, batch: step(state, shard(batch["pixels"]), shard(batch["label"]))

    def _next(self, batches: Batches, state: TrainState) -> dict[str, np.ndarray]:
        try:
            return next(batches)
        except (PictureError, WorkerLost):
            # What is wrong with the pictures shall not cost the steps before it. Several processes
            # save together only, and the others go on.
            if self.alone and int(state.step):
                self._save(state)
            raise

    def _log(self, state: TrainState, step: int, show: Show) -> None:
        """Write a row: means since the last one, and the speed without validations."""
        sums = jax.device_get(state.sums)
        _check_finite(sums["loss"])
        loss, accuracy = (float(sums[name] / sums["steps"]) for name in ("loss", "accuracy"))
        now = time.perf_counter()
        speed = self.config.batch_size * (step - self.logged) / (now - self.started)
        self.logged, self.started = step, now
        self.records.write(MetricsRow(step, self._epoch(step), loss, accuracy, speed))
        show(step, f"loss {loss:.3f}  accuracy {accuracy:.3f}  {speed:.0f} images/s")

    def _save(self, state: TrainState) -> None:
        _check_finite(state.sums["loss"])
        self.states.save(state)

    def _validate(self, state: TrainState, step: int, stop: StopRequest, show: Show) -> None:
        """Validate where that is due, but not once a stop is asked for: the resumed run does it."""
        validation, last = self.validation, self.records.last[ValidationRow]
        due = step == self.total_steps or ends_epoch(
            step, self.config.batch_size, len(self.folder), self.config.val_every
        )
        if validation is None or not due or (last and last.step == step) or stop.is_set():
            return

        def on_batch(seen: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            show(step, f"validated {seen}/{len(validation.source)}")

        started = time.perf_counter()
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self._report(step, *validation.measure(self.trainer.result(state), on_batch))
        except PictureError:  # Found by all processes, which save together.
            self._save(state)
            raise
        except (WorkerLost, RuntimeError, MemoryError) as error:
            # Nor shall this cost the steps before it.
            if self.alone and (isinstance(error, WorkerLost) or is_out_of_memory(error)):
                self._save(state)
            raise
        self.started += time.perf_counter() - started

    def _report(self, step: int, top1: float, loss: float) -> None:
        _check_finite(loss)
        row = ValidationRow(step, self._epoch(step), top1, loss)
        self.records.write(row)
        self.console.print(f"epoch {row.epoch}: top-1 {top1:.2f} %, loss {loss:.4f}")

    def _epoch(self, step: int) -> float:
        return round(step * self.config.batch_size / len(self.folder), 3)

    def _summary(self, first: int) -> str:
        """Say in a line what the run is about to do, from a step on."""
        devices = self.placement.devices
        on = f"{devices} x " if devices > 1 else ""
        count = self.validation and len(self.validation.source)
        validated = f"validated on {count}; " if count else ""
        return (
            f"{len(self.folder)} pictures, {len(self.folder.classes)} classes; {validated}"
            f"{self.total_steps} steps of {self.config.batch_size} from step {first} on {on}"
            f"{jax.local_devices()[0].device_kind}"
        )


def _check_finite(loss: Any) -> None:
    """Refuse a loss that is infinite or not a number.

    Raises:
        InputError: if it is.
    """
    if not math.isfinite(loss):
        raise InputError("the loss is no longer finite; begin again with a lower --learning-rate")


def _check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Check that every device gets as many pictures of each part of a batch as any other."""
    parts = accumulate * devices
    if batch_size % parts:
        near = max(1, round(batch_size / parts)) * parts
        shared = f" and {devices} devices" if devices > 1 else ""
        raise InputError(
            f"--batch-size {batch_size} does not divide by {parts} (--accumulate {accumulate}"
            f"{shared}); the nearest that does: {near}"
        )


def _remove(output: Path) -> None:
    """Remove a folder into which threads of Orbax may write for a moment after one has failed."""
    for _ in range(5):
        remove_folder(output)
        time.sleep(0.1)
