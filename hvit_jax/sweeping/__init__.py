"""Trying settings of all methods on one's own pictures and device."""

from hvit_jax.sweeping.choice import Sweep
from hvit_jax.sweeping.config import SweepConfig
from hvit_jax.sweeping.run import sweep

__all__ = ["Sweep", "SweepConfig", "sweep"]
