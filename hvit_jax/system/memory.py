"""Out of memory, said in one line that names the batch and what needs less."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from hvit_jax.errors import InputError
from hvit_jax.system.library_messages import is_out_of_memory


def smaller_batch(batch: int, multiple: int = 1) -> str:
    """Suggest a batch of about half the size.

    Args:
        batch: pictures at once, of all devices together.
        multiple: what batches have to divide by, such as the number of devices.
    """
    half = max(1, batch // multiple // 2) * multiple
    return f"try --batch-size {half}" if half < batch else "a smaller batch there is not"


def describe_out_of_memory(batch: int, advice: str) -> str:
    """Say in one line that a batch was too large.

    Args:
        batch: pictures at once.
        advice: what needs less.
    """
    return f"out of memory at batch {batch}; {advice}"


@contextlib.contextmanager
def explain_out_of_memory(batch: int, advice: str) -> Iterator[None]:
    """Turn errors of the device, or of Python, that say that memory ran out into one line.

    Args:
        batch: pictures at once.
        advice: what needs less.

    Raises:
        InputError: instead of such an error; others pass.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(describe_out_of_memory(batch, advice)) from error
