"""Accuracy and speed of a model on labelled pictures."""

from hvit_jax.evaluation.config import Classifying, EvalConfig
from hvit_jax.evaluation.run import evaluate

__all__ = ["Classifying", "EvalConfig", "evaluate"]
