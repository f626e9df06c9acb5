"""How pictures are prepared for published models where no file says it: by family."""

from __future__ import annotations

import dataclasses

from hvit_jax.architectures import model_name
from hvit_jax.config import ViTConfig
from hvit_jax.convert.keys import Layout
from hvit_jax.convert.pictures import FAMILIES
from hvit_jax.errors import unknown
from hvit_jax.pictures import Preprocessing, crop_share

# By the names of `--preprocessing`.
PREPROCESSING = {
    "swag": Preprocessing(),
    "torchvision": Preprocessing(crop_pct=0.875, interpolation="bilinear"),
    **{name.lower().replace(" ", "-"): how for name, how in FAMILIES.items()},
}


def family_of(layout: Layout, config: ViTConfig, file: str) -> str:
    """Name the family of a model: "SWAG", "torchvision", or one in `pictures.FAMILIES`.

    Args:
        layout: of the file.
        config: the model.
        file: its file's name.
    """
    name = file.lower()
    if config.rope is not None and config.rope.coordinates == "centred":
        return "DINOv3 sat493m" if "sat493m" in name else "DINOv3"
    if layout.family == "Segmenter":
        return "Segmenter deit" if config.distillation_token else "Segmenter vit"
    if layout.family:
        return layout.family
    if config.pre_norm:
        return "PE" if config.pool == "map" else "CLIP"
    if config.pool == "map":
        return "SigLIP"
    return "AugReg" if "augreg" in name else "ImageNet"


def preprocessing_of(
    name: str | None, file: str, family: str, config: ViTConfig
) -> tuple[str, Preprocessing]:
    """Find how pictures are prepared, and the name of that; without one it is assumed.

    torchvision has SWAG's weights under its own keys. Its own are all of 224 pixels; SWAG's of that
    size have "swag" in their file's name.
    """
    if name is None and family in ("SWAG", "torchvision"):
        own = config.image_shape == (224, 224) and "swag" not in file.lower()
        name = family.lower() if own else "swag"
    name = name or family.lower().replace(" ", "-")
    if name not in PREPROCESSING:
        raise unknown("preprocessing", name, PREPROCESSING)
    if name == "torchvision" and model_name(config) == "vit_l16":  # The one with another resize.
        return name, dataclasses.replace(PREPROCESSING[name], crop_pct=crop_share(224, 242))
    return name, PREPROCESSING[name]
