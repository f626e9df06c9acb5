"""Models as programs that run without this package."""

from hvit_jax.exporting.config import ExportConfig
from hvit_jax.exporting.run import export

__all__ = ["ExportConfig", "export"]
