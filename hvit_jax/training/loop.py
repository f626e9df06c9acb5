"""The steps of a run: when rows are written, states saved, and pictures validated on."""

from __future__ import annotations

import collections
import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from hvit_jax.data.loader import WorkerLost
from hvit_jax.data.picture import PictureError
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree
from hvit_jax.ops.platform import compiler_options
from hvit_jax.system.library_messages import is_out_of_memory
from hvit_jax.system.progress import Show, show_progress
from hvit_jax.system.signals import Stopped, handling
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.records import VALIDATION, MetricsRow, Records
from hvit_jax.training.states import StateFolder
from hvit_jax.training.trainer import Trainer, TrainState, no_sums
from hvit_jax.training.validation import Validate

Batches = Iterator[dict[str, np.ndarray]]
_LATE = 2  # Questions after which several processes know whether to stop.


@dataclass
class Loop:
    """Takes a run's steps."""

    trainer: Trainer
    states: StateFolder
    records: Records
    console: Console
    validate: Validate | None
    config: TrainConfig
    pictures: int  # Of an epoch.
    teacher: Tree | None = None  # See `Trainer.teacher`.
    _logged: tuple[int, float] = field(init=False)  # Step and time of the last row.

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.config.steps(self.pictures)

    def run(self, state: TrainState, batches: Batches) -> TrainState:
        """Take the steps that are left; after a signal, the state is saved all the same.

        Raises:
            KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM, once the state is saved; a
                second one does not wait for that.
        """
        step, placement = int(state.step), self.trainer.placement
        layout = jax.tree.map(lambda leaf: leaf.sharding, state)
        options = {"out_shardings": layout, "compiler_options": compiler_options()}
        take_step = jax.jit(self.trainer.step, donate_argnums=0, **options)
        shard, stop = placement.shard_batch, _Stop(placement)
        with (
            handling(stop.on_signal, signal.SIGINT, signal.SIGTERM),
            show_progress(self.console, self.steps, step, unit="steps", seconds=0.0) as show,
        ):
            self._logged = step, time.perf_counter()
            self._validate_if_due(state, step, stop, show)
            while step < self.steps and not stop.is_set():
                with self._saved_at_least(state):
                    batch = next(batches)
                pixels, labels = shard(batch["pixels"]), shard(batch["label"])
                state = take_step(state, pixels, labels, self.teacher)
                step += 1
                if step == self.steps or step % self.config.log_every == 0:
                    state = self._log(state, step, show)
                if step == self.steps or step % self.config.save_every == 0:
                    self._save(state)
                self._validate_if_due(state, step, stop, show)
            if step < self.steps:
                self._save(state)
            stopped = step < self.steps or stop.is_set()
        self.records.close()
        self.states.close()
        if stopped:
            raise stop.exception(f"interrupted after step {step}; --resume continues from there")
        return state

    def _log(self, state: TrainState, step: int, show: Show) -> TrainState:
        """Write a row: means since the last one, and the speed without validations."""
        sums = jax.device_get(state.sums)
        _check_finite(sums["loss"])
        loss, accuracy = (float(sums[name] / sums["steps"]) for name in ("loss", "accuracy"))
        (logged, started), now = self._logged, time.perf_counter()
        speed = self.config.batch_size * (step - logged) / (now - started)
        self._logged = step, now
        self.records.write(MetricsRow(step, self._epoch(step), loss, accuracy, speed))
        show(step, f"loss {loss:.3f}  accuracy {accuracy:.3f}  {speed:.0f} images/s")
        return state._replace(sums=self.trainer.placement.replicate(no_sums()))

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
            alone = self.trainer.placement.processes == 1
            together = alone or (by_all and isinstance(error, PictureError))
            if expected and together and int(state.step):
                self._save(state)
            raise

    def _validate_if_due(self, state: TrainState, step: int, stop: _Stop, show: Show) -> None:
        """Validate, but not once a stop is asked for: the resumed run does it."""
        last = self.records.last[VALIDATION]
        ends = ends_epoch(step, self.config.batch_size, self.pictures, self.config.val_every)
        due = (ends or step == self.steps) and not (last and last.step == step)
        if self.validate is None or not due or stop.is_set():
            return

        def on_batch(seen: int) -> None:
            if stop.is_set():
                raise KeyboardInterrupt
            if self.console.is_terminal:
                show(step, f"validated {seen} pictures")

        started = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt), self._saved_at_least(state, by_all=True):
            found = self.validate(self.trainer.result(state), on_batch)
            _check_finite(sum(found.scores.values()))
            row = found.kind(step, self._epoch(step), **found.scores)
            self.records.write(row)
            skipped = f", without {found.unreadable} unreadable" if found.unreadable else ""
            self.console.print(f"epoch {row.epoch}: {row}{skipped}")
        logged, since = self._logged
        self._logged = logged, since + time.perf_counter() - started

    def _epoch(self, step: int) -> float:
        return round(step * self.config.batch_size / self.pictures, 3)


def ends_epoch(step: int, batch_size: int, pictures: int, every: float) -> bool:
    """Tell whether a step is the first to reach a multiple of `every` epochs."""
    before, now = (each * batch_size // (pictures * every) for each in (step - 1, step))
    return step > 0 and now > before


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
        raise InputError("the loss is no longer finite; start again with a lower --learning-rate")
