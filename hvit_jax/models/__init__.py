"""The vision transformer: attention, one block, and the model made of them."""

from hvit_jax.models.vit import Features, ViT

__all__ = ["Features", "ViT"]
