"""Budgets of methods, measured on pictures."""

from hvit_jax.calibration.config import CalibrateConfig
from hvit_jax.calibration.run import Calibration, calibrate

__all__ = ["CalibrateConfig", "Calibration", "calibrate"]
