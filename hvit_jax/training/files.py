"""The newest states of a training run on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp

from hvit_jax import orbax_errors
from hvit_jax.errors import InputError, first_line
from hvit_jax.memory import is_out_of_memory
from hvit_jax.training.trainer import Metrics, TrainState


class StateFolder:
    """Keeps the newest training states on disk, each complete or absent."""

    def __init__(self, directory: Path):
        """Open or create the folder."""
        self.manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def save(self, state: TrainState, unread: Sequence[Metrics] = ()) -> None:
        """Write a state, unless its step is there already; it is written in the background.

        Args:
            state: the state.
            unread: metrics of steps that are in no row of metrics.csv yet.

        Raises:
            InputError: if it cannot be written, or the one before could not.
        """
        step = int(state.step)
        if step not in self.manager.all_steps():
            rows = [{name: float(value) for name, value in row.items()} for row in unread]
            items = {
                "state": ocp.args.StandardSave(state),
                "unread": ocp.args.JsonSave({"rows": rows}),
            }
            with self._writing():
                self.manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self, like: TrainState, *, note: Callable[[str], object] = print
    ) -> tuple[TrainState, list[Metrics]] | None:
        """Read the newest state that is whole, or give None where there is none at all.

        Args:
            like: a state of the same run; what is read lies on the same devices.
            note: is told of states that cannot be read.

        Returns:
            The state, and the metrics that were saved with it. Newer states, which cannot be read,
            are deleted.

        Raises:
            InputError: if none of them can be read.
        """
        items = {"state": ocp.args.StandardRestore(like), "unread": ocp.args.JsonRestore()}
        damaged = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored: Any = self.manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax and TensorStore have many names for damage.
                damaged.append((step, first_line(error)[:200]))
                continue
            for newer, reason in damaged:
                note(f"the state of step {newer} cannot be read, so step {step} it is: {reason}")
                self.manager.delete(newer)
            return restored.state, [_as_metrics(row) for row in restored.unread["rows"]]
        if damaged:
            step, reason = damaged[0]
            raise InputError(
                f"no state in {self.manager.directory} can be read; step {step}: {reason}"
            )
        return None

    def saved(self) -> bool:
        """Tell whether there is any state, of this run or of the one it goes on with."""
        return bool(self.manager.all_steps())

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            InputError: if it cannot be written.
        """
        with self._writing():
            try:
                self.manager.wait_until_finished()
            finally:
                self.manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have no common base class.
            if is_out_of_memory(error):
                raise
            self.manager.reload()  # It counts a state from when it begins to write it.
            place = self.manager.directory
            raise InputError(f"cannot write {place}: {orbax_errors.reason(error)}") from error


def _as_metrics(row: dict[str, float]) -> Metrics:
    return {name: jnp.float32(value) for name, value in row.items()}
