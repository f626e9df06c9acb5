"""Draw the documentation's figures: `python docs/figures.py` writes docs/figures/*.jpg."""

from __future__ import annotations

import sys
from pathlib import Path

from hvit_jax import REDUCERS, demo
from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import read_description
from hvit_jax.strengths import at_cost
from hvit_jax.visualization.cli import main as visualize

FOLDER = Path(__file__).parent / "figures"
PHOTOGRAPHS = sorted(str(path) for path in demo.pictures_dir().glob("*.jpg"))
RESOLUTION = 128


def flags(method: str) -> list[str]:
    """Give a method's options near 0.6 of the dense cost as a command line has them."""
    config = with_resolution(read_description(demo.checkpoint_dir()).config, RESOLUTION)
    words = ["--method", method]
    for name, value in at_cost(method, config, 0.6).options().items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    return words


def main() -> None:
    """Draw all of them."""
    options = ["-r", str(RESOLUTION), "-o"]
    status = visualize([*PHOTOGRAPHS, "--compare", *options, str(FOLDER / "compare.jpg")])
    for method in REDUCERS if not status else ():
        if method != "dense":
            output = str(FOLDER / f"{method}.jpg")
            status = status or visualize([*PHOTOGRAPHS[::2], *flags(method), *options, output])
    sys.exit(status)


if __name__ == "__main__":
    main()
