"""The newest states of a training run on disk: each complete or absent, with checksums inside."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hvit_jax.distributed.gathering import gather
from hvit_jax.errors import InputError
from hvit_jax.system.files import checksums, damages, read_json, write_json, writing
from hvit_jax.system.library_messages import is_out_of_memory, why_failed
from hvit_jax.training.trainer import TrainState

_CHECKSUMS = "checksums.json"
_ITEM = "default"  # Orbax's name for what is saved alone.
# What the system says where a state may be whole, though it cannot be read now.
_CODES = "EACCES EPERM EIO ESTALE ENOTCONN ETIMEDOUT EMFILE ENFILE ENOMEM".split()
_UNREACHABLE = {os.strerror(getattr(errno, code)) for code in _CODES}


class _Handler(ocp.StandardCheckpointHandler):
    """Orbax's way to store a tree, and checksums of its files, which Orbax has none of."""

    def finalize(self, directory) -> None:
        """Write the checksums; in process 0, before the folder takes its name."""
        super().finalize(directory)
        write_json(Path(directory) / _CHECKSUMS, checksums(Path(directory)))


class StateFolder:
    """The two newest states of a run."""

    def __init__(self, directory: Path):
        self.folder = directory.absolute()
        handlers, handler = ocp.handlers.DefaultCheckpointHandlerRegistry(), _Handler()
        for arguments in (ocp.args.StandardSave, ocp.args.StandardRestore):
            handlers.add(_ITEM, arguments, handler)
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, handler_registry=handlers
        )

    def save(self, state: TrainState) -> None:
        """Write a state in the background, unless it is there; a failure may show next time."""
        step = int(state.step)
        if step not in self.manager.all_steps():
            with self._writing():
                self.manager.save(step, args=ocp.args.StandardSave(state))

    def newest(
        self, like: TrainState, *, note: Callable[[str], object] = print
    ) -> TrainState | None:
        """Read the newest state that is whole, or give None where there is none at all.

        It lies on the devices of `like`, a state of the same run. Newer states, which are damaged,
        are noted and moved to damaged-STEP beside the folder. If all of them are, or the disk does
        not let one be read, nothing is moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            state, problem = self._read(step, like)
            if state is not None:
                for newer, reason in damaged.items():
                    note(
                        f"the state of step {newer} cannot be read, so the run continues from step "
                        f"{step} ({self._move_aside(newer)} holds the damaged one): {reason}"
                    )
                return state
            place = self.folder / str(step)
            if problem in _UNREACHABLE or not place.is_dir():
                raise InputError(f"cannot read {place}: {problem}")
            damaged[step] = problem
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise InputError(f"no state in {self.folder} can be read; step {step}: {reason}")
        return None

    def saved(self) -> bool:
        """Tell whether there is any state, of this run or of the one that it resumes."""
        return bool(self.manager.all_steps())

    def close(self) -> None:
        """Wait until everything is on disk."""
        with self._writing(), contextlib.closing(self.manager):
            self.manager.wait_until_finished()

    def _read(self, step: int, like: TrainState) -> tuple[TrainState | None, str]:
        """Read a state that fits its checksums; or say why not."""
        # All processes have to decide alike, and one reading of the files is enough.
        mine = _damage(self.folder / str(step)) if jax.process_index() == 0 else ""
        if problem := gather(mine)[0]:
            return None, problem
        try:
            state: Any = self.manager.restore(step, args=ocp.args.StandardRestore(like))
            return state, ""
        except Exception as error:  # Orbax and TensorStore have many names for damage.
            if is_out_of_memory(error):
                raise
            return None, why_failed(error)[:200]

    def _move_aside(self, step: int) -> Path:
        """Move a damaged state out of the manager's sight, and give its new name."""
        names = (f"damaged-{step}{more}" for more in ("", *(f"-{n}" for n in range(2, 100))))
        aside = next(path for path in map(self.folder.with_name, names) if not path.exists())
        if jax.process_index() == 0:
            with writing(aside):
                (self.folder / str(step)).rename(aside)
        gather(None)  # The others look at the folder once it is gone.
        self.manager.reload()
        return aside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have no common base class.
            if is_out_of_memory(error):
                raise
            self.manager.reload()  # It counts a state from when it begins to write it.
            raise InputError(f"cannot write {self.folder}: {why_failed(error)}") from error


def _damage(place: Path) -> str:
    """Describe how a state's files differ from their checksums; empty if they do not."""
    tree = place / _ITEM
    try:
        return "; ".join(damages(tree, read_json(tree / _CHECKSUMS)))
    except (InputError, OSError) as error:
        reason = why_failed(error.__cause__ or error)
        return reason if reason in _UNREACHABLE else str(error)
    except (LookupError, TypeError):
        return f"{tree / _CHECKSUMS} is damaged"
