"""Draw the documentation's figures: `python docs/figures.py` writes docs/figures/*.jpg."""

from __future__ import annotations

import sys
from pathlib import Path

from hvit_jax.commands.method_options import command_words

from hvit_jax import REDUCERS, demo
from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.visualize import SHARE
from hvit_jax.commands.visualize import main as visualize
from hvit_jax.costs import at_cost

FOLDER = Path(__file__).parent / "figures"
PHOTOGRAPHS = sorted(str(path) for path in demo.pictures_dir().glob("*.jpg"))
RESOLUTION = 128


def main() -> None:
    """Draw all of them."""
    options = ["-r", str(RESOLUTION), "-o"]
    config = with_resolution(read_description(demo.checkpoint_dir()).config, RESOLUTION)
    status = visualize([*PHOTOGRAPHS, "--compare", *options, str(FOLDER / "compare.jpg")])
    for method in REDUCERS if not status else ():
        if method != "dense":
            words, output = command_words(at_cost(method, config, SHARE)), FOLDER / f"{method}.jpg"
            status = status or visualize(
                [*PHOTOGRAPHS[::2], *words, *options, str(FOLDER / output)]
            )
    sys.exit(status)


if __name__ == "__main__":
    main()
