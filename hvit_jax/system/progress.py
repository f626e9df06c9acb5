"""What commands print: plain text, tables, and progress as a bar or a line twice a minute."""

from __future__ import annotations

import functools
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_SECONDS_BETWEEN_LINES = 30.0
Show = Callable[[int, str], None]

# Text of users is printed as it is: nothing coloured, read as markup or broken into lines.
plain_console = functools.partial(Console, highlight=False, markup=False, soft_wrap=True)


def print_table(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1
) -> None:
    """Print a table no wider than the terminal: several below each other where one is too wide.

    Args:
        console: where to; its width is that of the terminal, also behind a pipe.
        head: titles of the columns.
        rows: the cells of each row.
        names: how many columns on the left name a row. They stand in every part, and may be broken
            into lines, as titles may; the others are figures.
    """
    least = [
        max(
            map(cell_len, (*title.split(), *(cells if place >= names else " ".join(cells).split())))
        )
        for place, (title, *cells) in enumerate(zip(head, *rows, strict=True))
    ]
    parts: list[list[int]] = [[]]
    left = room = console.width - 1 - sum(3 + width for width in least[:names])
    for column in range(names, len(head)):
        if parts[-1] and 3 + least[column] > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= 3 + least[column]
    for part in parts:
        table = Table()
        for column in range(names):
            table.add_column(head[column], overflow="fold")
        fits = sum(3 + max(cell_len(head[column]), least[column]) for column in part) <= room
        for column in part:
            title = head[column]
            if not fits:
                title = "\n".join(textwrap.wrap(title, least[column]))
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[column] for column in (*range(names), *part)))
        console.print(table, soft_wrap=False)


@contextmanager
def show_progress(
    console: Console,
    total: int,
    first: int = 0,
    *,
    unit: str,
    seconds: float = _SECONDS_BETWEEN_LINES,
) -> Iterator[Show]:
    """Show how many of `total` units are done, `first` of them earlier, and the time that is left.

    Args:
        console: a terminal, which gets a bar, or another, which gets lines.
        total: units in all.
        first: units that were done before.
        unit: what they are called.
        seconds: between two lines, at least.

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
        if not console.is_terminal and now - last >= seconds:
            last = now
            left = (now - start) * (total - done) / max(1, done - first)
            console.print(f"{done}/{total} {unit}, {text}, {left:.0f} s left")

    hidden = not console.is_terminal
    with Progress(*columns, *times, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total, completed=first, text="")
        yield show
