"""Gone once training has moved on: see library_messages."""

from hvit_jax.system.library_messages import why_failed as reason

__all__ = ["reason"]
