"""The vision transformer: one block, the model made of it, and the interface of a method."""

from hvit_jax.models.vit import Features, ViT

__all__ = ["Features", "ViT"]
