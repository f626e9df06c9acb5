"""What `hvit demo` is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from hvit_jax.demo.config import OnCheckpoint
from hvit_jax.fields import option
from hvit_jax.system.programs import CACHE_HELP


@dataclass(frozen=True)
class DemoConfig(OnCheckpoint):
    """Which model to show in the browser, and where to serve the page."""

    host: str = option(
        "127.0.0.1", "address to serve on; 0.0.0.0 lets others in", metavar="ADDRESS"
    )
    port: int = option(7860, "port to serve on", least=1, most=65535)
    cache: bool = option(True, CACHE_HELP)
