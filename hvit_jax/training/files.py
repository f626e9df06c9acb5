"""The newest states of a training run on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from hvit_jax.distributed.together import gather
from hvit_jax.errors import InputError, first_line
from hvit_jax.system import orbax_errors
from hvit_jax.system.files import checksums, damages, write_atomically, writing
from hvit_jax.system.memory import is_out_of_memory
from hvit_jax.training.trainer import Metrics, TrainState

# What the system says where a state may be whole, though it cannot be read now.
_CODES = "EACCES EPERM EIO ESTALE ENOTCONN ETIMEDOUT EMFILE ENFILE ENOMEM".split()
_UNREACHABLE = {os.strerror(getattr(errno, code)) for code in _CODES}


class StateFolder:
    """Keeps the newest training states on disk, each complete or absent.

    Orbax has no checksums of them: they are kept beside the folder, in NAME-checksums.json.
    """

    def __init__(self, directory: Path):
        """Open or create the folder."""
        self.folder = directory.absolute()
        self.manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2)
        )
        self._checksums = _Checksums(self.folder)
        self._written: int | None = None  # The step whose checksums are still to be recorded.

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
                self.manager.wait_until_finished()
            self._record()
            with self._writing():
                self.manager.save(step, args=ocp.args.Composite(**items))
            self._written = step

    def restore(
        self, like: TrainState, *, note: Callable[[str], object] = print
    ) -> tuple[TrainState, list[Metrics]] | None:
        """Read the newest state that is whole, or give None where there is none at all.

        Args:
            like: a state of the same run; what is read lies on the same devices.
            note: is told of states that cannot be read.

        Returns:
            The state, and the metrics that were saved with it. Newer states, which are damaged,
            are moved aside, to damaged-STEP beside the folder.

        Raises:
            InputError: if all of them are damaged, or the disk does not let one be read.
        """
        damaged = []
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, like)
            except Exception as error:  # Orbax and TensorStore have many names for damage.
                self._pass_on(error, step)
                damaged.append((step, first_line(error)[:200]))
                continue
            for newer, reason in damaged:
                aside = self._move_aside(newer)
                note(
                    f"the state of step {newer} cannot be read, so step {step} it is "
                    f"({aside} keeps the other): {reason}"
                )
            return restored.state, [_as_metrics(row) for row in restored.unread["rows"]]
        if damaged:
            step, reason = damaged[0]
            raise InputError(f"no state in {self.folder} can be read; step {step}: {reason}")
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
        self._record()

    def _record(self) -> None:
        """Record the checksums of the state that has been written, and forget those that went."""
        if jax.process_index() == 0:
            self._checksums.update(self.manager.all_steps(), self._written)
        self._written = None

    def _read(self, step: int, like: TrainState) -> Any:
        """Read a state that fits its checksums.

        Raises:
            Exception: of any kind, if it is damaged.
        """
        # All have to decide alike; and one reading of the whole state is enough.
        found = self._checksums.damages(step) if jax.process_index() == 0 else []
        found = gather(found)[0]
        if found:
            raise ValueError("; ".join(found))
        items = {"state": ocp.args.StandardRestore(like), "unread": ocp.args.JsonRestore()}
        return self.manager.restore(step, args=ocp.args.Composite(**items))

    def _pass_on(self, error: Exception, step: int) -> None:
        """Raise an error that says nothing about whether a state is damaged."""
        if is_out_of_memory(error):
            raise error
        place, reason = self.folder / str(step), orbax_errors.reason(error)
        if reason in _UNREACHABLE or not place.is_dir():
            raise InputError(f"cannot read {place}: {reason}") from error

    def _move_aside(self, step: int) -> Path:
        """Move a damaged state out of the manager's sight, and give its new name."""
        names = (f"damaged-{step}{more}" for more in ("", *(f"-{n}" for n in range(2, 100))))
        aside = next(path for path in map(self.folder.with_name, names) if not path.exists())
        if jax.process_index() == 0:
            with writing(aside):
                (self.folder / str(step)).rename(aside)
        gather(None)  # The others look at the folder once it is gone.
        self.manager.reload()
        self._record()
        return aside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have no common base class.
            if is_out_of_memory(error):
                raise
            self.manager.reload()  # It counts a state from when it begins to write it.
            raise InputError(f"cannot write {self.folder}: {orbax_errors.reason(error)}") from error


class _Checksums:
    """The recorded checksums of states, by their steps, in one file."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder.with_name(f"{folder.name}-checksums.json")

    def damages(self, step: int) -> list[str]:
        """Describe what is damaged in a state; nothing if it was never recorded."""
        return damages(self.folder / str(step), self._read().get(str(step), {}))

    def update(self, steps: Sequence[int], written: int | None) -> None:
        """Keep the checksums of some steps only, and take those of one that was just written.

        A step that comes again after it was lost must not meet its old ones.

        Raises:
            InputError: if the state cannot be read, or the file not be written.
        """
        before = self._read()
        after = {name: value for name, value in before.items() if name in map(str, steps)}
        if written in steps:
            with writing(self.file):
                after[str(written)] = checksums(self.folder / str(written))
        if after != before:
            text = json.dumps(after, indent=2) + "\n"
            write_atomically(self.file, lambda file: file.write(text.encode()))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # Damaged, it says nothing about the states.
            return {}
        return content if isinstance(content, dict) else {}


def _as_metrics(row: dict[str, float]) -> Metrics:
    return {name: jnp.float32(value) for name, value in row.items()}
