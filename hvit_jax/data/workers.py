"""Processes that decode pictures: how they start, and how they end or die."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import TypeVar

from hvit_jax.errors import InputError, first_line
from hvit_jax.system.library_messages import is_dead_worker

Item = TypeVar("Item")


class WorkerLost(InputError):
    """A process that decodes pictures has died."""


def start_worker(index: int, count: int) -> None:
    """Keep a worker off the accelerator, deaf to Ctrl-C, and end it with its program.

    Args:
        index: of the worker.
        count: of all workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["JAX_PLATFORMS"] = "cpu"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def explained(batches: Iterator[Item]) -> Iterator[Item]:
    """Pass batches of Grain's on; a worker that dies becomes one line.

    Args:
        batches: of pictures.

    Raises:
        WorkerLost: if a worker has died.
    """
    try:
        yield from batches
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise WorkerLost(
            "a process that decodes pictures has died, perhaps for want of memory "
            f"({first_line(error)}); try fewer --workers or a smaller --batch-size"
        ) from error
