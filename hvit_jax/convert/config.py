"""What `hvit convert` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option


@dataclass(frozen=True)
class ConvertConfig(Options):
    """What to convert, and where to."""

    source: Path = option(
        help="the .torch or .pth file (with --to-torch: the folder)", metavar="SRC", positional=True
    )
    destination: Path = option(
        help="the folder to write (with --to-torch: the .torch file)",
        metavar="DST",
        positional=True,
    )
    heads: int | None = option(
        None, "attention heads; needed only for sizes other than vit_b16, vit_l16 and vit_h14"
    )
    entry: str | None = option(
        None,
        "which model to take from a file that holds several, such as model (default: averaged "
        "weights, such as model_ema, before others)",
        metavar="NAME",
    )
    to_torch: bool = option(
        False, "the other way: write the checkpoint SRC as a state dict in SWAG's format"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("heads", "entry"):
            if self.to_torch and getattr(self, name) is not None:
                raise InputError(
                    f"--{name} is for reading PyTorch files; with --to-torch it has no meaning"
                )
