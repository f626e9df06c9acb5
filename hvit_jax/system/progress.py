"""What a long run prints: plain text, and how far it is, as a bar or a line twice a minute."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 30.0
Show = Callable[[int, str], None]

# Text of users is printed as it is: nothing coloured, read as markup or broken into lines.
plain_console = functools.partial(Console, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def show_progress(console: Console, total: int, first: int = 0, *, unit: str) -> Iterator[Show]:
    """Show how many of `total` units are done, `first` of them earlier, and the time that is left.

    Yields:
        A function to call now and then with the units done, and a text about them.
    """
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[text]}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    start = last = time.monotonic()

    def show(done: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        bar.update(task, completed=done, text=text)
        if not console.is_terminal and now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) * (total - done) / max(1, done - first)
            console.print(f"{done}/{total} {unit}, {text}, {left:.0f} s left")

    hidden = not console.is_terminal
    with Progress(*columns, *times, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, completed=first, text="")
        yield show
