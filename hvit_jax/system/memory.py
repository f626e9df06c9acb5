"""Out of memory, said in one line that names the batch, in pictures, and what needs less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvit_jax.errors import InputError
from hvit_jax.system.library_messages import is_out_of_memory


def smaller_batch(batch: int, multiple: int = 1) -> str:
    """Suggest about half the batch, a multiple of a number such as that of the devices."""
    half = max(1, batch // multiple // 2) * multiple
    return f"try --batch-size {half}" if half < batch else "no smaller batch is possible"


def describe_out_of_memory(batch: int, advice: str) -> str:
    """Say in one line that a batch was too large."""
    return f"out of memory at batch {batch}; {advice}"


@contextlib.contextmanager
def explain_out_of_memory(batch: int, advice: str) -> Iterator[None]:
    """Turn errors that say that memory ran out into an InputError; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(describe_out_of_memory(batch, advice)) from error
