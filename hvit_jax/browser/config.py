"""What `hvit demo` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.fields import Options, option


@dataclass(frozen=True)
class DemoConfig(Options):
    """Which model to show in the browser, and where to serve the page."""

    checkpoint: Path | None = option(
        None,
        "a folder written by hvit convert or by training (default: the bundled demo)",
        metavar="DIR",
    )
    resolution: int | tuple[int, int] | None = option(
        None, "picture size, one number or height,width (default: the checkpoint's)", short="-r"
    )
    host: str = option(
        "127.0.0.1", "address to serve on; 0.0.0.0 lets others in", metavar="ADDRESS"
    )
    port: int = option(7860, "port to serve on", least=1, most=65535)
