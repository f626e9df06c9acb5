"""Pictures of what a method does with a picture's patches."""

from hvit_jax.visualization.config import VisualizeConfig
from hvit_jax.visualization.run import visualize

__all__ = ["VisualizeConfig", "visualize"]
