"""The layouts of PyTorch checkpoints: which key holds which parameter, in which shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from hvit_jax.config import Preprocessing


@dataclass(frozen=True)
class Transform:
    """How PyTorch's array becomes ours, as in `hvit_jax.models.parameters`, and back."""

    to_ours: Callable[[Float32[np.ndarray, "*shape"]], Float32[np.ndarray, "*shape"]]
    to_torch: Callable[[Float32[np.ndarray, "*shape"]], Float32[np.ndarray, "*shape"]]


def _patch_kernel(weight: Float32[np.ndarray, "C 3 p p"]) -> Float32[np.ndarray, "*shape"]:
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])


def _patch_convolution(kernel: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "C 3 p p"]:
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Transform(lambda array: array, lambda array: array)
TRANSPOSED = Transform(lambda array: array.T, lambda array: array.T)
CLASS_TOKEN = Transform(lambda array: array[0, 0], lambda array: array[None, None])
SEQUENCE_FIRST = Transform(lambda array: array[:, 0], lambda array: array[:, None])
BATCH_FIRST = Transform(lambda array: array[0], lambda array: array[None])
PATCHES = Transform(_patch_kernel, _patch_convolution)


@dataclass(frozen=True)
class Entry:
    """One row of a layout's table.

    Attributes:
        key: in the state dict; `{i}` is the number of the block, `{head}` the head's name.
        path: in our tree; those of all blocks are stacked below `blocks/`.
        shape: of PyTorch's array. Letters: C width, S positions, p patch side, M MLP width,
            K classes; 3C is three times C.
        transform: how the two differ.
    """

    key: str
    path: str
    shape: str
    transform: Transform

    @property
    def stacked(self) -> bool:
        """Whether every block has one of these."""
        return self.path.startswith("blocks/")


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint.

    Attributes:
        name: what messages call it.
        entries: a row for every parameter; the head's may be absent from a file.
        heads: what the head is called; first as the library does, then as where it was replaced.
        preprocessing: of the library's own weights, a name in `PREPROCESSING`.
    """

    name: str
    entries: tuple[Entry, ...]
    heads: tuple[str, ...]
    preprocessing: str = "swag"

    def key(self, entry: Entry, block: int | str = 0) -> str:
        """Write a row's key as it stands in a file."""
        return entry.key.format(i=block, head=self.heads[0])


def _norm(key: str, path: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{key}weight", f"{path}/scale", "C", SAME),
        Entry(f"{key}bias", f"{path}/bias", "C", SAME),
    )


def _linear(key: str, path: str, outputs: str, inputs: str) -> tuple[Entry, Entry]:
    return (
        Entry(f"{key}weight", f"{path}/kernel", f"{outputs} {inputs}", TRANSPOSED),
        Entry(f"{key}bias", f"{path}/bias", outputs, SAME),
    )


def _table(
    *, positions: tuple[str, Transform], block: str, mlp: tuple[str, str]
) -> tuple[Entry, ...]:
    """List every parameter; the arguments are all that the layouts differ in."""
    block = f"encoder.layers.{block}"
    return (
        Entry("class_token", "class_token", "1 1 C", CLASS_TOKEN),
        Entry("conv_proj.weight", "patch_embed/kernel", "C 3 p p", PATCHES),
        Entry("conv_proj.bias", "patch_embed/bias", "C", SAME),
        Entry("encoder.pos_embedding", "pos_embedding", *positions),
        *_norm(f"{block}.ln_1.", "blocks/ln_1"),
        *_linear(f"{block}.self_attention.in_proj_", "blocks/in_proj", "3C", "C"),
        *_linear(f"{block}.self_attention.out_proj.", "blocks/out_proj", "C", "C"),
        *_norm(f"{block}.ln_2.", "blocks/ln_2"),
        *_linear(f"{block}.mlp.{mlp[0]}.", "blocks/linear_1", "M", "C"),
        *_linear(f"{block}.mlp.{mlp[1]}.", "blocks/linear_2", "C", "M"),
        *_norm("encoder.ln.", "ln"),
        *_linear("{head}.", "head", "K", "C"),
    )


SWAG = Layout(
    "SWAG",
    _table(
        positions=("S 1 C", SEQUENCE_FIRST),
        block="layer_{i}",
        mlp=("linear_1", "linear_2"),
    ),
    ("head.layers.head", "head", "head.0", "head.1"),
)
_vision_table = functools.partial(
    _table, positions=("1 S C", BATCH_FIRST), block="encoder_layer_{i}"
)
_vision_heads = ("heads.head", "heads", "heads.0", "heads.1", "heads.head.0", "heads.head.1")
TORCHVISION = Layout("torchvision", _vision_table(mlp=("0", "3")), _vision_heads, "torchvision")
TORCHVISION_OLD = Layout(
    "torchvision (older)",
    _vision_table(mlp=("linear_1", "linear_2")),
    _vision_heads,
    "torchvision",
)
LAYOUTS = (SWAG, TORCHVISION, TORCHVISION_OLD)
# Those that are written, by the names of `--layout`.
WRITTEN = {"swag": SWAG, "torchvision": TORCHVISION}
# How pictures are prepared for them, by the names of `--preprocessing`.
PREPROCESSING = {
    "swag": Preprocessing(),
    "torchvision": Preprocessing(crop_pct=0.875, interpolation="bilinear"),
}
