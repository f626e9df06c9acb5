"""Accuracy and speed of a model on labelled pictures."""

from hvit_jax.evaluation.config import EvalConfig
from hvit_jax.evaluation.run import evaluate

__all__ = ["EvalConfig", "evaluate"]
