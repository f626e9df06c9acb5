"""How pictures are prepared for published models where no file says it: by family."""

from __future__ import annotations

import dataclasses
from typing import Any

from hvit_jax.architectures import model_name
from hvit_jax.config import ViTConfig
from hvit_jax.convert.keys import Layout
from hvit_jax.errors import unknown
from hvit_jax.pictures import MEAN, STD, Preprocessing, crop_share

CLIP: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET: dict[str, Any] = {"mean": MEAN, "std": STD}
# Of the weights that were trained on SAT-493M.
SATELLITE: dict[str, Any] = {"mean": (0.43, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
# For files without a description: what the authors of each family do.
FAMILIES = {
    "AugReg": Preprocessing(crop_pct=0.9, **HALF),
    "CLIP": Preprocessing(**CLIP),
    "DINOv2": Preprocessing(crop_pct=0.875),
    "DINOv3": Preprocessing(crop_mode="squash"),
    "DINOv3 sat493m": Preprocessing(crop_mode="squash", **SATELLITE),
    "ImageNet": Preprocessing(crop_pct=0.875),
    "PE": Preprocessing(crop_mode="squash", **HALF),
    "Segmenter deit": Preprocessing(interpolation="bilinear", **IMAGENET),
    "Segmenter vit": Preprocessing(interpolation="bilinear", **HALF),
    "SigLIP": Preprocessing(crop_mode="squash", **HALF),
}
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


def without_rest(
    prepared: Preprocessing, stated: tuple[int, int], config: ViTConfig
) -> Preprocessing:
    """Cut off what no whole patch covers of pictures of the size that a folder states."""
    rest = tuple(theirs - ours for theirs, ours in zip(stated, config.image_shape, strict=True))
    if not all(0 <= side < config.patch_size for side in rest):
        return prepared  # Another resolution was asked for.
    return dataclasses.replace(prepared, uncovered=rest)
