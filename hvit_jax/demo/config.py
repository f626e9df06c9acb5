"""Options of the tools that run a checkpoint, by default the demo's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax import demo
from hvit_jax.fields import Options, option


@dataclass(frozen=True, kw_only=True)
class OnCheckpoint(Options):
    """Which checkpoint a tool runs, and at which resolution."""

    checkpoint: Path | None = option(
        None,
        "a folder written by hvit convert or by training (default: the bundled demo)",
        metavar="DIR",
    )
    resolution: int | tuple[int, int] | None = option(
        None, "picture size, one number or height,width (default: the checkpoint's)", short="-r"
    )

    @property
    def folder(self) -> Path:
        """The checkpoint's folder; the demo's where none is named."""
        return self.checkpoint or demo.checkpoint_dir()
