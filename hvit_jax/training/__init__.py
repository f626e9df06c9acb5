"""Training and fine-tuning on class folders of pictures."""

from hvit_jax.training.config import TrainConfig
from hvit_jax.training.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
