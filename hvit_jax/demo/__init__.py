"""The bundled demo: a small ViT trained on Fashion-MNIST, and 1,000 of its test pictures."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def checkpoint_dir() -> Path:
    """Locate the demo's checkpoint, for `hvit_jax.load`."""
    return FOLDER / "checkpoint"


def images_dir() -> Path:
    """Locate the demo's pictures: class folders, the first 1,000 of Fashion-MNIST's test set."""
    return FOLDER / "images"


def pictures_dir() -> Path:
    """Locate a few photographs to look at; pictures.LICENSE says whose they are."""
    return FOLDER / "pictures"
