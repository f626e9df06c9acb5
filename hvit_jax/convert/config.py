"""What `hvit convert` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.architectures import ACTIVATIONS
from hvit_jax.config import RESIZING
from hvit_jax.convert.families import PREPROCESSING
from hvit_jax.convert.layouts import WRITTEN
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, flag, option

READING = (
    *("architecture", "heads", "resolution", "activation", "entry", "preprocessing"),
    *("norm_eps", "position_resizing", "taps", "depth_range"),
)


@dataclass(frozen=True)
class ConvertConfig(Options):
    """What to convert, and where to."""

    source: Path = option(
        help="the folder from the Hugging Face hub or of Segmenter, or the .safetensors, .pth, "
        ".pt or .bin file (with --to-torch: the checkpoint)",
        metavar="SRC",
        positional=True,
    )
    destination: Path = option(
        help="the folder to write (with --to-torch: the .safetensors, .pth, .pt or .bin file)",
        metavar="DST",
        positional=True,
    )
    architecture: str | None = option(
        None,
        "timm's name of the model, such as vit_base_patch14_dinov2; needed only for files without "
        "config.json that leave something open",
        metavar="NAME",
    )
    heads: int | None = option(
        None, "attention heads (default: as config.json says, or as usual for the width)"
    )
    resolution: int | tuple[int, int] | None = option(
        None,
        "the model's picture size, one number or height,width (default: as config.json or "
        "--to-torch wrote, or a square)",
    )
    activation: str | None = option(
        None,
        "of the MLPs (default: as config.json says, or as usual for the layout)",
        choices=tuple(ACTIVATIONS),
    )
    entry: str | None = option(
        None,
        "which model to take from a file that holds several, such as model (default: averaged "
        "weights, such as model_ema, before others)",
        metavar="NAME",
    )
    preprocessing: str | None = option(
        None,
        "whose pictures it was trained on: how they are resized, cut and normalised (default: as "
        "the folder says, or by layout, resolution and file name)",
        choices=tuple(PREPROCESSING),
    )
    norm_eps: float | None = option(
        None,
        "what norms of the backbone add to variances (default: as the folder says, or as usual for "
        "the layout)",
        above=0,
    )
    position_resizing: str | None = option(
        None,
        "the rule by which positions are fitted to other grids (default: the layout's)",
        choices=RESIZING,
    )
    head: Path | None = option(
        None,
        "a file with a head of DINOv2's for segments or depth, beside the backbone SRC (with "
        "--to-torch: the file to write it to, which otherwise stands in DST)",
        metavar="FILE",
    )
    taps: tuple[int, ...] | None = option(
        None,
        "the blocks that this head reads, from 0, such as 8,9,10,11 (default: as published for the "
        "depth)",
        least=0,
    )
    depth_range: tuple[float, float] | None = option(
        None,
        "least and largest depth in metres of a head that estimates it (default: as published, by "
        "the file's name)",
        metavar="LEAST,MOST",
        above=0,
    )
    to_torch: bool = option(
        False, "the other way: write the checkpoint SRC as a state dict for PyTorch"
    )
    layout: str | None = option(
        None,
        "with --to-torch, whose keys to write (default: those of the file it comes from)",
        choices=tuple(WRITTEN),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.layout and not self.to_torch:
            raise InputError("--layout is for --to-torch; that of SRC is found by its keys")
        for name in READING:
            if self.to_torch and getattr(self, name) is not None:
                raise InputError(
                    f"{flag(name)} is for reading PyTorch files; with --to-torch it has no meaning"
                )
