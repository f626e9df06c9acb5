"""What `hvit visualize` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.demo.config import OnCheckpoint
from hvit_jax.errors import InputError
from hvit_jax.fields import option
from hvit_jax.reducers import Hourglass, Reducer, method_of_checkpoint
from hvit_jax.system.figures import FORMATS
from hvit_jax.system.programs import CACHE_HELP

SHARE, OTHERWISE = 0.6, Hourglass()


@dataclass(frozen=True)
class VisualizeConfig(OnCheckpoint):
    """Which pictures to draw, under which method, behind which blocks, and where to."""

    images: tuple[str, ...] = option(
        help="pictures, a row each, upright as their EXIF data says",
        metavar="IMAGE",
        positional=True,
    )
    output: Path = option(
        help="a file that ends in .png, .jpg, .svg or .pdf; replaced if it exists",
        short="-o",
        metavar="FILE",
        ends=FORMATS,
    )
    reducer: Reducer | None = method_of_checkpoint(OTHERWISE)
    after: tuple[int, ...] | None = option(
        None,
        "show tokens after these blocks, counted from 0 (default: a third, two thirds, the last)",
    )
    compare: bool = option(
        False, "draw all methods after one block, each with the setting nearest to --share"
    )
    share: float | None = option(
        None,
        f"with --compare: share of the dense model's GFLOPs (default: {SHARE:g})",
        above=0,
        most=1,
    )
    cache: bool = option(True, CACHE_HELP)

    def __post_init__(self):
        super().__post_init__()
        if not self.compare and self.share is not None:
            raise InputError("--share is for --compare; leave it out, or give the method's options")
        if self.compare and self.reducer not in (None, OTHERWISE):
            words = self.reducer.words()
            surplus = words[0] if self.reducer.name != Hourglass.name else words[2]
            raise InputError(f"--compare draws all methods at --share; leave {surplus} out")
        if self.compare and self.after is not None and len(self.after) != 1:
            raise InputError(f"--compare shows one block; --after names {len(self.after)}")
