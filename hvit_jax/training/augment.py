"""RandAugment on single pictures; mixup and cutmix on batches."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageEnhance, ImageOps

STRENGTHS = 30  # Strengths of RandAugment go from 0 to this.
Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *matrix: int | float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


# RandAugment's operations, each of a picture and a share of its full strength: from -1 to 1 where
# both directions differ, else from 0 to 1. Full strengths are those of AutoAugment.
SIGNED: dict[str, Operation] = {
    "shear_x": lambda image, share: _affine(image, 1, 0.3 * share, 0, 0, 1, 0),
    "shear_y": lambda image, share: _affine(image, 1, 0, 0, 0.3 * share, 1, 0),
    "translate_x": lambda image, share: _affine(
        image, 1, 0, -int(150 / 331 * image.width * share), 0, 1, 0
    ),
    "translate_y": lambda image, share: _affine(
        image, 1, 0, 0, 0, 1, -int(150 / 331 * image.height * share)
    ),
    "rotate": lambda image, share: image.rotate(30 * share),
    "brightness": lambda image, share: ImageEnhance.Brightness(image).enhance(1 + 0.9 * share),
    "color": lambda image, share: ImageEnhance.Color(image).enhance(1 + 0.9 * share),
    "contrast": lambda image, share: ImageEnhance.Contrast(image).enhance(1 + 0.9 * share),
    "sharpness": lambda image, share: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * share),
}
UNSIGNED: dict[str, Operation] = {
    "identity": lambda image, share: image,
    "posterize": lambda image, share: ImageOps.posterize(image, 8 - round(4 * share)),
    "solarize": lambda image, share: ImageOps.solarize(image, round(255 * (1 - share))),
    "autocontrast": lambda image, share: ImageOps.autocontrast(image),
    "equalize": lambda image, share: ImageOps.equalize(image),
}
OPERATIONS = {**SIGNED, **UNSIGNED}


def rand_augment(
    image: Image.Image, operations: int, strength: int, random: np.random.Generator
) -> Image.Image:
    """Change a picture by random operations (Cubuk et al. 2020, arXiv 1909.13719).

    Operations, their full strengths and the black margins are those of torchvision's RandAugment.

    Args:
        image: an RGB picture.
        operations: how many operations follow each other.
        strength: of each, from 0 to `STRENGTHS`.
        random: chooses the operations and their directions.
    """
    for name in random.choice(list(OPERATIONS), operations):
        share = strength / STRENGTHS
        if name in SIGNED and random.random() < 0.5:
            share = -share
        image = OPERATIONS[name](image, share)
    return image


def mix(
    pixels: UInt8[Array, "B H W 3"],
    targets: Float[Array, "B classes"],
    key: Array,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[UInt8[Array, "B H W 3"], Float[Array, "B classes"]]:
    """Mix every picture of a batch, and its target, with the one before it.

    Mixup (Zhang et al. 2018, arXiv 1710.09412) adds the two up; cutmix (Yun et al. 2019, arXiv
    1905.04899) puts a rectangle of one into the other. If both are on, half of the batches get
    each. All pictures of a batch are mixed alike, as in torchvision and timm.

    Args:
        pixels: the pictures.
        targets: what the model should say of each: shares of classes, which sum to 1.
        key: of the random numbers; the same key mixes alike.
        mixup: alpha of mixup, whose ratio is from Beta(alpha, alpha); 0 is off.
        cutmix: alpha of cutmix, the same for the share of the area.
    """
    if not mixup and not cutmix:
        return pixels, targets
    keys = jax.random.split(key, 3)
    cut = jax.random.bernoulli(keys[0]) if mixup and cutmix else jnp.array(bool(cutmix))
    alpha = jnp.where(cut, cutmix or 1.0, mixup or 1.0)
    ratio = jax.random.beta(keys[1], alpha, alpha)
    own = jnp.where(cut, 1.0 - _rectangle(pixels.shape[1:3], 1.0 - ratio, keys[2]), ratio)
    share, own = own.mean(), own[None, :, :, None]
    mixed = own * pixels + (1 - own) * jnp.roll(pixels, 1, 0)
    return mixed.round().astype(jnp.uint8), share * targets + (1 - share) * jnp.roll(targets, 1, 0)


def _rectangle(size: tuple[int, ...], area: Float[Array, ""], key: Array) -> Float[Array, "H W"]:
    """Mark a rectangle of a share of the area around a random place, cut off at the edges."""
    centre = jax.random.uniform(key, (2,)) * jnp.array(size)
    inside = []
    for side, middle in zip(size, centre, strict=True):
        half = 0.5 * side * jnp.sqrt(area)
        places: Int[Array, " side"] = jnp.arange(side)
        inside.append((places >= jnp.floor(middle - half)) & (places < jnp.floor(middle + half)))
    return (inside[0][:, None] & inside[1][None]).astype(jnp.float32)
