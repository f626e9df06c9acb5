"""What `hvit convert` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.convert.keys import PREPROCESSING, WRITTEN
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option


@dataclass(frozen=True)
class ConvertConfig(Options):
    """What to convert, and where to."""

    source: Path = option(
        help="the .torch, .pth or .safetensors file (with --to-torch: the folder)",
        metavar="SRC",
        positional=True,
    )
    destination: Path = option(
        help="the folder to write (with --to-torch: the .torch, .pth or .safetensors file)",
        metavar="DST",
        positional=True,
    )
    heads: int | None = option(
        None, "attention heads; needed only for sizes other than vit_b16, vit_l16 and vit_h14"
    )
    grid: tuple[int, int] | None = option(
        None,
        "rows and columns of patches (default: as many rows as columns, or as --to-torch wrote)",
        metavar="ROWS,COLUMNS",
        least=1,
    )
    entry: str | None = option(
        None,
        "which model to take from a file that holds several, such as model (default: averaged "
        "weights, such as model_ema, before others)",
        metavar="NAME",
    )
    preprocessing: str | None = option(
        None,
        "how pictures are prepared: resized and cut as by SWAG or as for torchvision's own weights "
        "(default: by layout, resolution and file name)",
        choices=tuple(PREPROCESSING),
    )
    to_torch: bool = option(
        False, "the other way: write the checkpoint SRC as a state dict for PyTorch"
    )
    layout: str | None = option(
        None,
        "with --to-torch, whose keys to write (default: swag)",
        choices=tuple(WRITTEN),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.layout and not self.to_torch:
            raise InputError("--layout is for --to-torch; that of SRC is found by its keys")
        for name in ("heads", "grid", "entry", "preprocessing"):
            if self.to_torch and getattr(self, name) is not None:
                raise InputError(
                    f"--{name} is for reading PyTorch files; with --to-torch it has no meaning"
                )
