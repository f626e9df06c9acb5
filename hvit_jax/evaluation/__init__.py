"""Accuracy and speed of a model on labelled pictures."""

from hvit_jax.evaluation.score import score
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally

__all__ = ["Tally", "compile_step", "score"]
