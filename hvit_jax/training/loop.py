"""The training loop: one compiled step, repeated until the end or a request to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hvit_jax.data.folder import PictureError
from hvit_jax.data.workers import WorkerLost
from hvit_jax.errors import InputError
from hvit_jax.system.memory import is_out_of_memory
from hvit_jax.training.stopping import StopRequest, stop_requests
from hvit_jax.training.trainer import Metrics, TrainState

Step = Callable[[TrainState, np.ndarray, np.ndarray], tuple[TrainState, Metrics]]
Save = Callable[[TrainState, Sequence[Metrics]], None]
Validate = Callable[[TrainState, int, Callable[[], bool]], None]


def run_steps(
    take_step: Step,
    state: TrainState,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    total_steps: int,
    log_every: int,
    save_every: int,
    save: Save,
    unread: Sequence[Metrics] = (),
    log: Callable[[dict[str, Any]], None],
    processes: int = 1,
    agree: Callable[[bool], bool] = bool,
    validate: Validate = lambda state, step, stopped: None,
) -> TrainState:
    """Train until `total_steps`, logging means and saving the state on the way.

    Args:
        take_step: a step on one batch.
        state: where to start.
        batches: training batches from the state's step on.
        total_steps: steps in all.
        log_every: steps between two logged rows.
        save_every: steps between two saved states; the last one is saved too.
        save: called with the state and the metrics of the steps since the last row; also when the
            run is interrupted.
        unread: those metrics, where the run goes on from a saved state.
        log: called with `step` and the means since the last row.
        processes: how many share every step.
        agree: tells all of them whether any wants to stop.
        validate: called with the state after every step, and first with the one to start from; with
            the steps done, and a function that tells whether to give up.

    Returns:
        The state after the last step.

    Raises:
        InputError: if the loss is no longer finite, a picture cannot be read, or a worker has died;
            the two latter leave the state saved, except where several processes share it.
        KeyboardInterrupt: after SIGINT or SIGTERM (then `Stopped`), once the state is saved.
    """
    step, meter = int(state.step), _Meter(unread)
    alone = processes == 1

    def keep(state: TrainState) -> None:
        for row in meter.unread[-1:]:  # Those before it are in a row, which is checked too.
            check_finite(row["loss"])
        save(state, meter.unread)

    with stop_requests(agree) as stop:
        _validate(validate, state, step, stop, keep, alone)
        while step < total_steps and not stop.is_set():
            batch = _next(batches, state, keep if alone else None)
            state, metrics = take_step(state, batch["pixels"], batch["label"])
            step += 1
            meter.add(metrics, processes * len(batch["label"]))
            last = step == total_steps
            if last or step % log_every == 0:
                log({"step": step, **meter.read()})
            if last or step % save_every == 0 or stop.is_set():
                keep(state)
            with meter.paused():
                _validate(validate, state, step, stop, keep, alone)
        if stop.is_set():
            keep(state)
            raise stop.exception(f"interrupted after step {step}; --resume goes on from there")
    return state


def _next(
    batches: Iterator[dict[str, np.ndarray]],
    state: TrainState,
    keep: Callable[[TrainState], None] | None,
) -> dict[str, np.ndarray]:
    try:
        return next(batches)
    except (PictureError, WorkerLost):
        # What is wrong with the pictures shall not cost the steps before it. Processes that share
        # the state save together only, and the others go on.
        if keep is not None and int(state.step):
            keep(state)
        raise


def _validate(
    validate: Validate,
    state: TrainState,
    step: int,
    stop: StopRequest,
    keep: Callable[[TrainState], None],
    alone: bool,
) -> None:
    """Validate, but not once a stop is asked for: the resumed run does it."""
    if stop.is_set():
        return
    try:
        with contextlib.suppress(KeyboardInterrupt):
            validate(state, step, stop.is_set)
    except (PictureError, WorkerLost, RuntimeError, MemoryError) as error:
        # Neither that nor too little memory shall cost the steps before it. A bad picture stops all
        # processes here; what stops only one of them leaves none to save with.
        if isinstance(error, PictureError) or (alone and not _defect(error)):
            keep(state)
        raise


def _defect(error: BaseException) -> bool:
    return not (isinstance(error, WorkerLost) or is_out_of_memory(error))


def check_finite(loss: Any) -> None:
    """Refuse a loss that is no number.

    Raises:
        InputError: if it is infinite or not a number.
    """
    if not math.isfinite(loss):
        raise InputError("the loss is no longer finite; begin again with a lower --learning-rate")


class _Meter:
    """Means and speed since it was last read."""

    def __init__(self, unread: Sequence[Metrics] = ()):
        self.started = time.perf_counter()
        self.unread = list(unread)
        self.pictures = 0

    def add(self, metrics: Metrics, pictures: int) -> None:
        """Add a step; its metrics may still be on their way from the device."""
        self.unread.append(metrics)
        self.pictures += pictures

    def read(self) -> dict[str, Any]:
        """Give the means of the steps since the last reading, and their speed."""
        names = self.unread[0]
        means = {name: float(np.mean([row[name] for row in self.unread])) for name in names}
        check_finite(means["loss"])
        speed = self.pictures / (time.perf_counter() - self.started)
        self.__init__()
        return {**means, "images_per_second": speed}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out."""
        paused = time.perf_counter()
        yield
        self.started += time.perf_counter() - paused
