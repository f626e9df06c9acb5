"""Sizes of a vision transformer, how it is computed, and how pictures are prepared for it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp

from hvit_jax.errors import InputError, unknown
from hvit_jax.fields import Options, option

DTYPES = ("float32", "bfloat16", "float64")
# Commands offer no float64: it is for comparing models from Python, with JAX_ENABLE_X64=1.
IN_COMMANDS = {"dtype": ("float32", "bfloat16")}
ATTENTION = ("auto", "hopper", "cudnn", "xla")
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
GELU = ("auto", "exact", "tanh")
LARGEST = 1 << 20  # Of any size; far above all models, and small enough to reckon with.


def as_pair(value: Any) -> tuple[int, int]:
    """Read a height and width given as one number or as two.

    Raises:
        InputError: for anything but one or two whole numbers.
    """
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(_is_whole(side) for side in pair):
        raise InputError(f"expected one or two whole numbers (height, width), got {value!r}")
    return int(pair[0]), int(pair[1])


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

    Attributes:
        resolution: image (height, width) in pixels; one int stands for a square.
        patch_size: side of a square patch in pixels; divides both sides of the image.
        depth: number of transformer blocks.
        width: channels of a token, `C`.
        heads: attention heads; divides `width`.
        mlp_width: hidden channels of each MLP.
        num_classes: outputs of the classification head; 0 for a model without a head.
    """

    resolution: int | tuple[int, int]
    patch_size: int
    depth: int
    width: int
    heads: int
    mlp_width: int
    num_classes: int = 1000

    def __post_init__(self):
        object.__setattr__(self, "resolution", as_pair(self.resolution))
        for field in dataclasses.fields(self)[1:]:
            value, least = getattr(self, field.name), int(field.name != "num_classes")
            if not _is_whole(value) or not least <= value <= LARGEST:
                raise InputError(
                    f"{field.name} must be a whole number from {least} to {LARGEST}, got {value!r}"
                )
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by {self.heads} heads")
        for side in self.image_shape:
            if not 0 < side <= LARGEST or side % self.patch_size:
                near = max(1, round(min(side, LARGEST) / self.patch_size)) * self.patch_size
                raise InputError(
                    f"resolution {side} is not a multiple of the patch size {self.patch_size}; "
                    f"the nearest that is: {near}"
                )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return as_pair(self.resolution)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patch tokens at the model's input, `P`."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, `D`."""
        return self.width // self.heads

    def blocks_at(self, *fractions: float) -> tuple[int, ...]:
        """Find the blocks at fractions of the depth, from block 1 on, each once."""
        last = self.depth - 1
        near = {round(self.depth * fraction) for fraction in fractions}
        return tuple(sorted({min(last, max(min(1, last), block)) for block in near}))

    @classmethod
    def vit_b16(cls) -> ViTConfig:
        """ViT-B/16 at 384, the resolution of SWAG's ImageNet-1k fine-tuning."""
        return cls(384, 16, depth=12, width=768, heads=12, mlp_width=3072)

    @classmethod
    def vit_l16(cls) -> ViTConfig:
        """ViT-L/16 at 512, the resolution of SWAG's ImageNet-1k fine-tuning."""
        return cls(512, 16, depth=24, width=1024, heads=16, mlp_width=4096)

    @classmethod
    def vit_h14(cls) -> ViTConfig:
        """ViT-H/14 at 518, the resolution of SWAG's ImageNet-1k fine-tuning."""
        return cls(518, 14, depth=32, width=1280, heads=16, mlp_width=5120)


@dataclass(frozen=True)
class Compute(Options):
    """How a model is computed, whatever it computes.

    Types are given by their names or as themselves, such as `jnp.bfloat16`; names are kept.

    Raises:
        InputError: for a value that is not accepted, or float64 where JAX does not compute in it.
    """

    dtype: str = option("float32", "number format that blocks compute in", choices=DTYPES)
    param_dtype: str | None = option(
        None, "what the blocks' weights are stored in (default: as --dtype)", choices=DTYPES
    )
    attention: str = option(
        "auto",
        "which attention kernel: our own for Hopper, cuDNN's or XLA's; auto: the first that runs",
        choices=ATTENTION,
    )
    gelu: str = option(
        "auto",
        "GELU exactly, or by tanh, which is faster on GPUs; auto: tanh on a GPU in 16 bits",
        choices=GELU,
    )
    unroll: bool = option(
        False, "compile every block on its own: longer to compile, often a little faster"
    )
    remat: bool = option(
        False, "compute blocks again in the backward pass: less memory, about a third more time"
    )

    def __post_init__(self):
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _type_name(getattr(self, name)))
        super().__post_init__()
        if "float64" in (self.dtype, self.param_dtype) and not jax.config.read("jax_enable_x64"):
            raise InputError("dtype 'float64' needs JAX_ENABLE_X64=1 in the environment")

    @classmethod
    def label(cls, name: str) -> str:
        """Name a field in messages as `hvit_jax.load` does; command lines name their own flags."""
        return name

    @property
    def types(self) -> tuple[jnp.dtype, jnp.dtype]:
        """The types that blocks are computed in, and that their weights are stored in."""
        return jnp.dtype(self.dtype), jnp.dtype(self.param_dtype or self.dtype)


# ImageNet's mean and standard deviation of red, green and blue, on a scale from 0 to 1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing(Options):
    """How a picture becomes a model's input; the default is SWAG's.

    The picture is resized to the model's resolution divided by `crop_pct`, rounded down, and cut to
    the resolution. `crop_pct=0.875` at 224 is torchvision's `Resize(256)` and `CenterCrop(224)`.

    Raises:
        InputError: for a value that is not accepted.
    """

    crop_pct: float = option(
        1.0, "share of the resized picture's side that the crop keeps", above=0, most=1
    )
    crop_mode: str = option(
        "center",
        "center keeps the aspect and cuts off what is too long; squash changes the aspect; border "
        "shows the whole picture with margins in the mean colour",
        choices=("center", "squash", "border"),
    )
    rounding: str = option(
        "torchvision",
        "whose rounding of sizes and margins; they differ by one pixel",
        choices=("torchvision", "timm", "transformers"),
    )
    interpolation: str = option(
        "bicubic",
        "how pictures are resized, with antialiasing",
        choices=INTERPOLATIONS,
    )
    mean: tuple[float, float, float] = option(MEAN, "subtracted from red, green and blue in [0, 1]")
    std: tuple[float, float, float] = option(STD, "what they are divided by then", above=0)

    @classmethod
    def label(cls, name: str) -> str:
        """Name a field in messages as `model.json` does."""
        return name


@dataclass(frozen=True)
class Preparing(Options):
    """What a command changes of the preprocessing that a checkpoint stores."""

    crop_pct: float | None = option(
        None,
        "share of the resized picture's side that the crop keeps, such as 0.875 (default: the "
        "checkpoint's)",
        above=0,
        most=1,
        metavar="SHARE",
        group="preprocessing",
    )
    interpolation: str | None = option(
        None,
        "how pictures are resized (default: the checkpoint's)",
        choices=INTERPOLATIONS,
        group="preprocessing",
    )
    exif: bool = option(
        False,
        "turn pictures upright by the orientation in their EXIF data; torchvision does not",
        group="preprocessing",
    )

    def changed(self, stored: Preprocessing) -> Preprocessing:
        """Give a checkpoint's preprocessing with what is changed of it."""
        given = {"crop_pct": self.crop_pct, "interpolation": self.interpolation}
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(stored, **given)


def crop_share(kept: int, resized: int) -> float:
    """Find the `crop_pct` under which a side of `resized` pixels is cut to `kept`, exactly."""
    share = kept / resized
    # For sides such as 354 and 224 the quotient rounds to a number that gives one pixel less.
    return share if int(kept / share) == resized else math.nextafter(share, 0)


def _type_name(dtype: Any) -> Any:
    """Name a type such as `jnp.bfloat16`; names, and what is no type, stay as they are."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return dtype


MODELS = {name: getattr(ViTConfig, name)() for name in ("vit_b16", "vit_l16", "vit_h14")}


def named_config(name: str) -> ViTConfig:
    """Look up a published size by its name.

    Raises:
        InputError: for an unknown name.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name]


def model_name(config: ViTConfig) -> str:
    """Name the published size whose blocks and patches these are, or "custom"."""
    body = ("patch_size", "depth", "width", "heads", "mlp_width")
    for name, known in MODELS.items():
        if all(getattr(known, field) == getattr(config, field) for field in body):
            return name
    return "custom"
