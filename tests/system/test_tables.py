"""Tables of all commands: no wider than the terminal."""

import io

import pytest
from rich.console import Console

from hvit_jax.system.progress import print_table

HEAD = ("method", "GFLOPs", "top-1 (%)", "images/s")
ROWS = [
    ("hourglass cluster_location=3 num_clusters=144", "24.4", "88.1", "1352.0"),
    ("[a]", "1", "", "2"),
]


def printed(width):
    text = io.StringIO()
    print_table(Console(file=text, width=width, markup=False, highlight=False), HEAD, ROWS)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [200, 80, 60, 45, 36])
def test_no_wider_than_the_terminal_and_whole(width):
    lines = printed(width)
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    words = " ".join((*HEAD, *ROWS[0], *ROWS[1])).split()
    assert all(word in text for word in words) and "…" not in text


def test_what_does_not_fit_stands_below_with_the_names_again():
    wide, narrow = printed(100), printed(45)
    assert [sum("method" in line for line in lines) for lines in (wide, narrow)] == [1, 2]
    assert sum("[a]" in line for line in narrow) == 2
    assert sum("cluster_location=3" in line for line in narrow) == 2
