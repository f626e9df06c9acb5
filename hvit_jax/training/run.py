"""One training run, from reading the pictures to the trained checkpoint."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.data.folder import read_folder
from hvit_jax.data.loader import WorkerLost
from hvit_jax.data.picture import PictureError
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.ops.platform import compiler_options
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.system.files import remove_folder
from hvit_jax.system.library_messages import is_out_of_memory
from hvit_jax.system.memory import explain_out_of_memory
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import Show, plain_console, show_progress
from hvit_jax.system.signals import Stopped, handling
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.data import training_batches
from hvit_jax.training.records import MetricsRow, Records, ValidationRow, import_tensorboard
from hvit_jax.training.settings import gather_settings, open_output, read_settings
from hvit_jax.training.start import find_validation, first_parameters
from hvit_jax.training.states import StateFolder
from hvit_jax.training.trainer import Trainer, TrainState, make_optimizer
from hvit_jax.training.validation import Validation, ends_epoch

Batches = Iterator[dict[str, np.ndarray]]
_LATE = 2  # Questions after which several processes know whether to stop.


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
    use_compilation_cache(config.cache)
    quiet = jax.process_index() > 0
    console = console or plain_console(quiet=quiet)
    run = _Run(config, console, batches)
    with explain_out_of_memory(config.batch_size, config.less_memory(run.placement.devices)):
        state = run.train()
    return run.finish(state)


class _Run:
    """A run whose output folder is open."""

    def __init__(self, config: TrainConfig, console: Console, batches: Callable[..., Batches]):
        self.config, self.console, self.batches = config, console, batches
        self.placement = place(shard=config.shard_parameters)
        self.alone = self.placement.processes == 1
        config.check_devices(self.placement.devices)
        self.folder = read_folder(config.data, splits=("train",))
        pictures = find_validation(config, self.folder.classes)
        model, self.parameters, note = first_parameters(config, self.folder.classes)
        self.total_steps = config.total_steps(len(self.folder))
        reducer, optimizer = config.reducer.resolve(model), make_optimizer(config, len(self.folder))
        self.trainer = Trainer(config, model, reducer, optimizer, self.placement)
        settings = gather_settings(self.trainer, self.folder, pictures)
        open_output(config.output, settings, resume=config.resume)
        if note is not None:
            console.print(note)
        warn_if_slow(config.compute.dtype, console.print)
        self.validation = None
        if pictures is not None:
            self.validation = Validation(self.trainer, pictures, self.folder.classes)
        self.states = StateFolder(config.output / "state")

    def train(self) -> TrainState:
        """Train from the newest state in the output folder, or from the first parameters."""
        try:
            state = self.placement.shard_state(self.trainer.init(self.parameters))
            if self.config.resume:
                state = self.states.restore(state, note=self.console.print) or state
            return self._take_steps(state)
        except BaseException as error:
            saved = self._close_early(error)
            if not isinstance(error, KeyboardInterrupt) or error.args:
                raise
            rest = "--resume goes on from the newest saved state" if saved else "nothing was saved"
            raise type(error)(f"interrupted; {rest}") from error

    def finish(self, state: TrainState) -> TrainResult:
        """Write the trained model, from process 0."""
        trained = self.placement.gather(self.trainer.result(state))
        checkpoint = self.config.output / "checkpoint"
        if jax.process_index() == 0:
            source = {"format": "hvit_jax.train", **read_settings(self.config.output)}
            model = self.trainer.model_config
            del source["model"]
            save_checkpoint(checkpoint, trained, Description(model, source, self.folder.classes))
            self.console.print(f"wrote {checkpoint}")
        rows = self.records.last
        return TrainResult(checkpoint, self.total_steps, rows[MetricsRow], rows[ValidationRow])

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
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        options = {"out_shardings": layout, "compiler_options": compiler_options()}
        take_step = jax.jit(self.trainer.step, donate_argnums=0, **options)
        resolution, shard = self.trainer.model_config.image_shape, self.placement.shard_batch
        batches, stop = self.batches(config, self.folder, resolution, step), _Stop(self.placement)
        with (
            handling(stop.on_signal, signal.SIGINT, signal.SIGTERM),
            show_progress(self.console, total, step, unit="steps") as show,
        ):
            self.logged, self.started = step, time.perf_counter()  # The last row's step and time.
            self._validate(state, step, stop, show)
            while step < total and not stop.is_set():
                with self._saved_at_least(state):
                    batch = next(batches)
                state = take_step(state, shard(batch["pixels"]), shard(batch["label"]))
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

    @contextlib.contextmanager
    def _saved_at_least(self, state: TrainState, *, by_all: bool = False) -> Iterator[None]:
        """Save the state if pictures, workers or memory fail: that shall not cost earlier steps.

        Several processes save together only, so `by_all` tells that a picture fails in all of them.
        """
        try:
            yield
        except (PictureError, WorkerLost, RuntimeError, MemoryError) as error:
            expected = isinstance(error, InputError) or is_out_of_memory(error)
            together = self.alone or (by_all and isinstance(error, PictureError))
            if expected and together and int(state.step):
                self._save(state)
            raise

    def _validate(self, state: TrainState, step: int, stop: _Stop, show: Show) -> None:
        """Validate where that is due, but not once a stop is asked for: the resumed run does it."""
        config, validation, last = self.config, self.validation, self.records.last[ValidationRow]
        ends = ends_epoch(step, config.batch_size, len(self.folder), config.val_every)
        due = (ends or step == self.total_steps) and not (last and last.step == step)
        if validation is None or not due or stop.is_set():
            return

        def on_batch(seen: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            show(step, f"validated {seen}/{len(validation.source)}")

        started = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt), self._saved_at_least(state, by_all=True):
            top1, loss = validation.measure(self.trainer.result(state), on_batch)
            _check_finite(loss)
            row = ValidationRow(step, self._epoch(step), top1, loss)
            self.records.write(row)
            self.console.print(f"epoch {row.epoch}: top-1 {top1:.2f} %, loss {loss:.4f}")
        self.started += time.perf_counter() - started

    def _epoch(self, step: int) -> float:
        return round(step * self.config.batch_size / len(self.folder), 3)

    def _summary(self, first: int) -> str:
        """Say in a line what the run is about to do, from a step on."""
        devices = self.placement.devices
        on = f"{devices} x " if devices > 1 else ""
        validated = f"validated on {len(self.validation.source)}; " if self.validation else ""
        return (
            f"{len(self.folder)} pictures, {len(self.folder.classes)} classes; {validated}"
            f"{self.total_steps} steps of {self.config.batch_size} from step {first} on {on}"
            f"{jax.local_devices()[0].device_kind}"
        )


class _Stop:
    """Whether to stop; in several processes, whether a signal asked any of them to.

    There, the answer is some questions late, so that asking never waits for a device to be idle,
    and every process has to ask equally often.
    """

    def __init__(self, placement: Placement):
        self.exception: type[KeyboardInterrupt] = KeyboardInterrupt
        self._placement, self._wanted, self._found = placement, False, False
        self._any = jax.jit(jnp.any, out_shardings=placement.replicated)
        self._asked: collections.deque[jax.Array] = collections.deque()

    def is_set(self) -> bool:
        if self._placement.processes == 1:
            return self._wanted
        rows = self._placement.devices // self._placement.processes
        self._asked.append(self._any(self._placement.shard_batch(np.full(rows, self._wanted))))
        if len(self._asked) > _LATE and self._asked.popleft():
            self._found = True
        return self._found

    def on_signal(self, number: int, frame: Any) -> None:
        """Note a signal; a second one does not wait for the end of the step."""
        self.exception = Stopped if number == signal.SIGTERM else KeyboardInterrupt
        if self._wanted:
            raise self.exception
        self._wanted = True


def _check_finite(loss: Any) -> None:
    if not math.isfinite(loss):
        raise InputError("the loss is no longer finite; begin again with a lower --learning-rate")


def _remove(output: Path) -> None:
    """Remove a folder into which threads of Orbax may write for a moment after one has failed."""
    for _ in range(5):
        remove_folder(output)
        time.sleep(0.1)
