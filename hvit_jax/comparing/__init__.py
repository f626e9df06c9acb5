"""Methods compared on one's own pictures and device, beside the dense model and the baselines."""

from hvit_jax.comparing.config import CompareConfig
from hvit_jax.comparing.rows import Comparison
from hvit_jax.comparing.run import compare

__all__ = ["CompareConfig", "Comparison", "compare"]
