"""The newest states of a training run on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from hvit_jax.errors import InputError, first_line
from hvit_jax.training.trainer import TrainState


class StateFolder:
    """Keeps the newest training states on disk, each complete or absent."""

    def __init__(self, directory: Path):
        """Open or create the folder."""
        self.manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )

    def save(self, state: TrainState) -> None:
        """Write a state, unless its step is there already."""
        step = int(state.step)
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState) -> TrainState | None:
        """Read the newest state, or None where there is none.

        Args:
            like: a state of the same run; what is read lies on the same devices.

        Raises:
            InputError: if it belongs to another model or optimiser.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        try:
            restored: Any = self.manager.restore(step, args=ocp.args.StandardRestore(like))
            return restored
        except (ValueError, KeyError, TypeError) as error:
            reason = first_line(error)[:200]
            raise InputError(
                f"{self.manager.directory} holds the state of another run: {reason}"
            ) from error

    def saved(self) -> bool:
        """Tell whether there is any state, of this run or of the one it goes on with."""
        return bool(self.manager.all_steps())

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()
