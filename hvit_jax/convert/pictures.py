"""How pictures are prepared for a model, read from its folder or known of its family."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from hvit_jax.config import ViTConfig, as_pair
from hvit_jax.errors import InputError, unknown
from hvit_jax.pictures import MEAN, STD, Preprocessing, crop_share
from hvit_jax.system.files import read_json

Size = tuple[int, int]
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


def without_rest(prepared: Preprocessing, stated: Size, config: ViTConfig) -> Preprocessing:
    """Cut off what no whole patch covers of pictures of the size that a folder states."""
    rest = tuple(theirs - ours for theirs, ours in zip(stated, config.image_shape, strict=True))
    if not all(0 <= side < config.patch_size for side in rest):
        return prepared  # Another resolution was asked for.
    return dataclasses.replace(prepared, uncovered=rest)


def timm_preprocessing(about: dict[str, Any]) -> Preprocessing | None:
    """Read what timm's `pretrained_cfg` says; what is absent is as timm takes it.

    Returns:
        The preprocessing; None if nothing of it is there.
    """
    if not {"mean", "std", "crop_pct", "crop_mode", "interpolation", "input_size"} & about.keys():
        return None
    return Preprocessing(
        crop_pct=about.get("crop_pct") or 0.875,
        crop_mode=about.get("crop_mode") or "center",
        rounding="timm",
        interpolation=about.get("interpolation") or "bicubic",
        mean=_triple(about.get("mean") or MEAN),
        std=_triple(about.get("std") or STD),
    )


def open_clip_preprocessing(about: dict[str, Any]) -> Preprocessing:
    """Read what OpenCLIP's `preprocess_cfg` says.

    Raises:
        InputError: for a way of resizing that is not its default or "squash".
    """
    modes = {"shortest": "center", "squash": "squash"}
    mode = about.get("resize_mode") or "shortest"
    if mode not in modes:
        raise unknown("resize_mode", mode, modes)
    return Preprocessing(
        crop_mode=modes[mode],
        interpolation=about.get("interpolation") or "bicubic",
        mean=_triple(about.get("mean") or CLIP["mean"]),
        std=_triple(about.get("std") or CLIP["std"]),
    )


# Where transformers' classes take what a preprocessor_config.json does not say.
_SQUARE = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
_SHORTEST = {"size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": 224}
_BILINEAR, _BICUBIC = {"resample": 2}, {"resample": 3}
_PROCESSORS = {
    "ViT": {**_SQUARE, **_BILINEAR, **HALF},
    "DeiT": {**_SQUARE, **_BICUBIC, **HALF, "size": 256, "do_center_crop": True, "crop_size": 224},
    "Bit": {**_SHORTEST, **_BICUBIC, **CLIP},
    "DINOv3ViT": {**_SQUARE, **_BILINEAR, **IMAGENET},
    "CLIP": {**_SHORTEST, **_BICUBIC, **CLIP},
    "Siglip": {**_SQUARE, **_BICUBIC, **HALF},
    "Siglip2": {**_SQUARE, **_BILINEAR, **HALF, "size": None},
}
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_CLASS = re.compile(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")


def transformers_preprocessing(
    folder: Path, usual: str, native: Size | None
) -> tuple[Preprocessing, Size | None] | None:
    """Read a folder's `preprocessor_config.json`; what is absent is as its class takes it.

    Args:
        folder: of the model.
        usual: the class that models of this type use, such as "ViT".
        native: height and width of the model's pictures, where the processor does not say.

    Returns:
        The preprocessing, with the margins of transformers, and the height and width that it ends
        in; None if the folder does not say.

    Raises:
        InputError: for a step that cannot be followed.
    """
    file = folder / "preprocessor_config.json"
    if file.is_file():
        stated = read_json(file)
    elif (file := folder / "processor_config.json").is_file():
        stated = read_json(file).get("image_processor") or {}
    else:
        return None
    if not stated:
        return None
    kind = stated.get("image_processor_type") or stated.get("feature_extractor_type") or ""
    match = _CLASS.fullmatch(kind)
    name = match[1] if match and match[1] in _PROCESSORS else usual
    about = {**_PROCESSORS[name], **{key: each for key, each in stated.items() if each is not None}}
    try:
        return _processor(about, name, native)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _processor(
    about: dict[str, Any], name: str, native: Size | None
) -> tuple[Preprocessing, Size | None]:
    if not about.get("do_resize", True):
        raise InputError("do_resize is false: pictures of all sizes cannot be put into one batch")
    if about["resample"] not in _FILTERS:
        raise InputError(f"resample {about['resample']!r} is not one of {_FILTERS}")
    size, shortest = _size(about["size"], name)
    crop, _ = _size(about.get("crop_size"), "")
    crop = crop if about["do_center_crop"] and crop else size
    share = 1.0
    if crop and size:
        if crop[0] > size[0] or crop[1] > size[1]:
            raise InputError(f"crop_size {crop} is larger than size {size}")
        share = crop_share(min(crop), min(size))
    mean, std = _statistics(about)
    return Preprocessing(
        crop_pct=share,
        crop_mode="center" if shortest else "squash",
        rounding="transformers",
        interpolation=_FILTERS[about["resample"]],
        mean=mean,
        std=std,
    ), crop or native


def _size(size: Any, name: str) -> tuple[Size | None, bool]:
    """Read a size: height and width, and whether a picture's short side comes to it."""
    if size is None:  # SigLIP 2 NaFlex: as many patches as fit.
        return None, False
    if not isinstance(size, dict):
        return as_pair(size), name in ("CLIP", "Bit")
    if "height" in size and "width" in size:
        return as_pair((size["height"], size["width"])), False
    if "shortest_edge" in size:
        return as_pair(size["shortest_edge"]), True
    raise InputError(f"size {size} names neither height and width nor shortest_edge")


def _statistics(about: dict[str, Any]) -> tuple[Any, Any]:
    """Read mean and deviation, on a scale from 0 to 1 whatever the pixels are multiplied by."""
    mean, std = _triple(about.get("image_mean") or about["mean"]), about.get("image_std")
    std = _triple(std or about["std"])
    if not about.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = about.get("rescale_factor", 1 / 255) if about.get("do_rescale", True) else 1.0
    scale = 255 * factor
    if abs(scale - 1) > 1e-6:
        mean, std = (tuple(each / scale for each in values) for values in (mean, std))
    return mean, std


def _triple(values: Any) -> Any:
    """Make a tuple of what should be three numbers; the record checks them."""
    return tuple(values) if isinstance(values, list | tuple) else values
