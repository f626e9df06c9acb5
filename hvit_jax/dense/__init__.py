"""Maps of whole pictures: segments and depth, by windows; and how good they are on a data set."""

from hvit_jax.dense.picture import predict, predict_scores

__all__ = ["predict", "predict_scores"]
