"""The training loop: one compiled step, repeated until the end or a request to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8

from hvit_jax.config import ViTConfig
from hvit_jax.data.preprocess import normalize
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree, build_model
from hvit_jax.reducers import Reducer


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        step: steps done.
        parameters: the model's parameters in float32.
        optimizer: the optimiser's state.
    """

    step: Int[Array, ""]
    parameters: Tree
    optimizer: optax.OptState


@dataclass(frozen=True)
class Trainer:
    """What stays fixed during a run.

    Attributes:
        config: the model's sizes.
        reducer: the method to train under.
        optimizer: made by `make_optimizer`.
        dtype: what blocks are computed in; parameters stay in float32.
        label_smoothing: share of the target spread over all classes.
    """

    config: ViTConfig
    reducer: Reducer
    optimizer: optax.GradientTransformation
    dtype: str
    label_smoothing: float

    def init(self, parameters: Tree) -> TrainState:
        """Make the state before the first step."""
        parameters = jax.tree.map(jnp.asarray, parameters)
        return TrainState(jnp.zeros((), jnp.int32), parameters, self.optimizer.init(parameters))

    def loss(
        self, parameters: Tree, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Compute the smoothed cross entropy and the accuracy of a batch."""
        model = build_model(
            self.config, self.reducer, parameters, dtype=self.dtype, param_dtype="float32"
        )
        logits = model(normalize(pixels))
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), self.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (logits.argmax(-1) == labels).mean()

    def step(
        self, state: TrainState, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        """Take one step; to be compiled with the state donated."""
        gradient = jax.value_and_grad(self.loss, has_aux=True)
        (loss, accuracy), grads = gradient(state.parameters, pixels, labels)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, state.parameters)
        parameters = jax.tree.map(jnp.add, state.parameters, updates)
        state = TrainState(state.step + 1, parameters, optimizer)
        return state, {"loss": loss, "accuracy": accuracy}


def run_steps(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    total_steps: int,
    log_every: int,
    save_every: int,
    save: Callable[[TrainState], None],
    log: Callable[[dict[str, Any]], None],
) -> TrainState:
    """Train until `total_steps`, logging means and saving the state on the way.

    Args:
        trainer: what to run.
        state: where to start.
        batches: training batches from the state's step on.
        total_steps: steps in all.
        log_every: steps between two logged rows.
        save_every: steps between two saved states.
        save: called with the state; also when the run is interrupted.
        log: called with `step` and the means since the last row.

    Returns:
        The state after the last step.

    Raises:
        InputError: if the loss is no longer finite.
        KeyboardInterrupt: after SIGINT or SIGTERM, once the state is saved.
    """
    compiled = jax.jit(trainer.step, donate_argnums=0)
    step, pending, started = int(state.step), [], time.perf_counter()
    with _stop_requests() as stop:
        while step < total_steps:
            batch = next(batches)
            state, metrics = compiled(state, batch["pixels"], batch["label"])
            step += 1
            pending.append(metrics)
            if step % log_every == 0 or step == total_steps:
                log({"step": step, **_summarize(pending, len(batch["label"]), started)})
                pending, started = [], time.perf_counter()
            if step < total_steps and (step % save_every == 0 or stop.is_set()):
                _check_finite(metrics["loss"])
                save(state)
                if stop.is_set():
                    raise KeyboardInterrupt
    return state


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Turn SIGINT and SIGTERM into an event: between two steps the state is whole.

    A second signal does not wait for the end of the step.
    """
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = [signal.signal(number, handle) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _check_finite(loss: Any) -> None:
    if not math.isfinite(loss):
        raise InputError("the loss is no longer finite; begin again with a lower --learning-rate")


def _summarize(pending: list[dict[str, Array]], batch_size: int, started: float) -> dict[str, Any]:
    means = {name: float(np.mean([row[name] for row in pending])) for name in pending[0]}
    _check_finite(means["loss"])
    elapsed = time.perf_counter() - started
    return {**means, "images_per_second": len(pending) * batch_size / elapsed}
