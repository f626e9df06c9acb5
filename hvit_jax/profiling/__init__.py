"""Measure GFLOPs, latency, throughput and memory; `profile.py` and `hvit profile`."""

from hvit_jax.profiling.config import ProfileConfig
from hvit_jax.profiling.run import profile

__all__ = ["ProfileConfig", "profile"]
