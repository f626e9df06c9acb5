"""Sizes of a vision transformer, and how it is computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option

STORED_DTYPES = ("float32", "bfloat16", "float64")
DTYPES = (*STORED_DTYPES, "float8")
# Commands offer no float64: it is for comparing models from Python, with JAX_ENABLE_X64=1.
IN_COMMANDS = {"dtype": ("float32", "bfloat16", "float8")}
WITHOUT_FLOAT8 = {"dtype": ("float32", "bfloat16")}
ATTENTION = ("auto", "hopper", "cudnn", "xla")
GELU = ("auto", "exact", "tanh")
# How tables of learned positions are fitted to another grid; see `hvit_jax.ops.resizing`.
RESIZING = ("swag", "bicubic", "bicubic_antialias", "dinov2", "bilinear", "bilinear_antialias")
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
class Rope(Options):
    """Rotary positions of the patches: queries and keys are turned by their places' angles.

    Su et al. 2021, arXiv 2104.09864, along two axes. An axis' angles are a patch's coordinate
    divided by each of `periods`. Prefix tokens and values are not turned.

    Attributes:
        periods: D / 4 numbers for heads of D channels, the same for both axes.
        coordinates: "centred": 2 pi times the patch's centre, where an axis runs from -1 to 1
            (DINOv3); "grid": its index plus `offset`, on an axis of as many patches as `reference`
            (EVA02, PE).
        reference: rows and columns of the grid that the model was trained on; None: the index is
            taken as it is. For "grid" alone.
        offset: added to the index; for "grid" alone.
        first_axis: the axis whose angles come first: "y" or "x".
        interleaved: whether neighbouring channels turn together; else each turns with the one
            D / 2 behind it.
    """

    called: ClassVar[str] = "rope: {}"  # As model.json has it.
    periods: tuple[float, ...] = option(above=0)
    coordinates: str = option("centred", choices=("centred", "grid"))
    reference: tuple[int, int] | None = option((1, 1), least=1)
    offset: float = option(0.0)
    first_axis: str = option("y", choices=("y", "x"))
    interleaved: bool = option(False)

    @classmethod
    def spaced(cls, head_dim: int, base: int | float = 100, **switches: Any) -> Rope:
        """Space the periods evenly in their logarithms; by default make DINOv3's.

        Args:
            head_dim: channels of an attention head, D.
            base: what the periods go up to from 1, without reaching it.
            **switches: the other fields.
        """
        periods = (base ** (2 * k / (head_dim / 2)) for k in range(head_dim // 4))
        return cls(tuple(periods), **switches)


def _size(default: Any = dataclasses.MISSING, *, least: int = 1) -> Any:
    return option(default, least=least, most=LARGEST)


@dataclass(frozen=True)
class Decoder(Options):
    """What makes a map of the tokens: segments, or depths.

    Attributes:
        kind: `linear`: one linear layer; `mask`: Segmenter's mask transformer (Strudel et al. 2021,
            arXiv 2105.05633); `bn_linear`: DINOv2's linear head, which normalises by its statistics
            first; `depth_linear`: its depth in bins; `depth_dpt`: DPT's (Ranftl et al. 2021, arXiv
            2103.13413) depth.
        outputs: classes, or bins of depth; 1 for `depth_dpt`.
        taps: the blocks whose tokens are read, counted from 0; none: the final tokens.
        depth: blocks of `mask`.
        heads: attention heads of these.
        norm_eps: added to the variance in the norms of `mask` and `bn_linear`.
        channels: of the maps that `depth_dpt` fuses.
        tap_channels: of the maps that it makes of each tap.
        depth_range: least and largest depth, in metres.
        restore: where a method's tokens become the full grid again: their `masks` are spread over
            it, before which the decoder runs on fewer; the `tokens` are; or they are already behind
            a `block`, as Hourglass's `reconstruct_location` says. None: the first that the method
            can do.
    """

    called: ClassVar[str] = "decoder: {}"
    kind: str = option(choices=("linear", "mask", "bn_linear", "depth_linear", "depth_dpt"))
    outputs: int = _size()
    taps: tuple[int, ...] = option((), least=0)
    depth: int = _size(0, least=0)
    heads: int = _size(1)
    norm_eps: float = option(1e-5, above=0)
    channels: int = _size(256)
    tap_channels: tuple[int, ...] = option((), least=1)
    depth_range: tuple[float, float] = option((0.001, 10.0), above=0)
    restore: str | None = option(None, choices=("masks", "tokens", "block"))

    @property
    def task(self) -> str:
        """What the map shows: "segmentation" or "depth"."""
        return "depth" if self.kind.startswith("depth") else "segmentation"

    def block_config(self, width: int) -> ViTConfig:
        """Describe one block of `mask`, as a model of one block, of so many channels."""
        return ViTConfig(1, 1, 1, width, self.heads, 4 * width, norm_eps=self.norm_eps)


@dataclass(frozen=True)
class ViTConfig(Options):
    """A plain vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): sizes and switches.

    What is not given is as in SWAG's. In the order in which a picture goes through the model:

    Attributes:
        resolution: image (height, width) in pixels; one int stands for a square.
        patch_size: side of a square patch in pixels; divides both sides of the image.
        depth: number of transformer blocks.
        width: channels of a token, `C`.
        heads: attention heads; divides `width`.
        mlp_width: hidden channels of each MLP, `M`.
        num_classes: outputs of the classification head; 0 for a model without a head.
        patch_bias: whether the projection of the patches has a bias.
        class_token: whether a CLS token stands in front of the patches.
        distillation_token: whether DeiT's distillation token comes next.
        registers: register tokens (Darcet et al. 2024), which come last before the patches.
        position_embedding: whether there is a table of learned positions.
        position_prefix: of how many of the tokens before the patches it has entries too: the first.
        position_resizing: how it is fitted to another grid; see `hvit_jax.ops.resizing`.
        rope: rotary positions; None: none.
        pre_norm: whether tokens are normalised before the first block.
        qkv_bias: which of the projections to q, k and v have a bias.
        qk_norm: whether q and k are normalised, each head on its own.
        layer_scale: whether each branch is scaled by a vector (Touvron et al. 2021).
        activation: of the MLPs: the exact GELU, its approximation by tanh, `x sigmoid(1.702 x)`,
            or `x sigmoid(x)`.
        gated: whether the activation of one half of the hidden channels gates the other (SwiGLU);
            `mlp_width` is then the width of one half.
        mlp_norm: whether the hidden channels are normalised.
        norm_eps: added to the variance in every LayerNorm.
        final_norm: whether tokens are normalised after the last block.
        pool: what the tokens become: CLS; the mean of the patches; both side by side; the result of
            a query that attends to the patches (`map`, Zhai et al. 2022); or the mean of what two
            heads say, of CLS and of the distillation token.
        pool_heads: attention heads of `map`; 0: as many as in the blocks.
        pool_mlp_width: hidden channels of the MLP of `map`; 0: `mlp_width`.
        pool_prefix: whether `map` attends to the tokens before the patches too.
        pool_before_norm: whether the tokens are pooled as they are before the final norm.
        pooled_norm: whether the pooled feature is normalised.
        projection: outputs of a projection without bias that stands in place of a head (CLIP); 0:
            none.
        decoder: what makes a map of the tokens, in place of pooling and head; None: nothing.

    Raises:
        InputError: for a value that is not accepted, or values that do not fit each other.
    """

    called: ClassVar[str] = "{}"
    resolution: int | tuple[int, int] = option()
    patch_size: int = _size()
    depth: int = _size()
    width: int = _size()
    heads: int = _size()
    mlp_width: int = _size()
    num_classes: int = _size(1000, least=0)
    patch_bias: bool = True
    class_token: bool = True
    distillation_token: bool = False
    registers: int = _size(0, least=0)
    position_embedding: bool = True
    position_prefix: int = _size(1, least=0)
    position_resizing: str = option("swag", choices=RESIZING)
    rope: Rope | None = None
    pre_norm: bool = False
    qkv_bias: str = option("all", choices=("all", "qv", "none"))
    qk_norm: bool = False
    layer_scale: bool = False
    activation: str = option("gelu", choices=("gelu", "gelu_tanh", "quick_gelu", "silu"))
    gated: bool = False
    mlp_norm: bool = False
    norm_eps: float = option(1e-6, above=0)
    final_norm: bool = True
    pool: str = option("cls", choices=("cls", "avg", "cls+avg", "map", "two heads"))
    pool_heads: int = _size(0, least=0)
    pool_mlp_width: int = _size(0, least=0)
    pool_prefix: bool = False
    pool_before_norm: bool = False
    pooled_norm: bool = False
    projection: int = _size(0, least=0)
    decoder: Decoder | None = None

    def __post_init__(self):
        object.__setattr__(self, "resolution", as_pair(self.resolution))
        super().__post_init__()
        self._check_heads()
        for side in self.image_shape:
            if not 0 < side <= LARGEST or side % self.patch_size:
                near = max(1, round(min(side, LARGEST) / self.patch_size)) * self.patch_size
                raise InputError(
                    f"resolution {side} is not a multiple of the patch size {self.patch_size}; "
                    f"the nearest that is: {near}"
                )
        if self.position_embedding and self.position_prefix > self.prefix_tokens:
            raise InputError(
                f"position_prefix is {self.position_prefix}, but only {self.prefix_tokens} tokens "
                "stand before the patches"
            )
        if any(tap >= self.depth for tap in self.taps):
            last = self.depth - 1
            raise InputError(f"decoder: taps are blocks from 0 to {last}, got {self.taps}")
        needed = {"cls": "class_token", "cls+avg": "class_token", "two heads": "distillation_token"}
        token = needed.get(self.pool)
        if token and not getattr(self, token):
            raise InputError(f"pool {self.pool!r} needs {token}")

    def _check_heads(self) -> None:
        for heads in (self.heads, self.pool_heads or self.heads):
            if self.width % heads:
                raise InputError(f"width {self.width} is not divisible by {heads} heads")
        if self.rope is not None and 4 * len(self.rope.periods) != self.head_dim:
            raise InputError(
                f"rotary positions of {len(self.rope.periods)} periods are for heads of "
                f"{4 * len(self.rope.periods)} channels, not {self.head_dim}"
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
    def prefix_tokens(self) -> int:
        """Tokens before the patches, `K`: CLS, the distillation token, registers."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first block, `K + P`."""
        return self.prefix_tokens + self.num_patches

    @property
    def position_entries(self) -> int:
        """Entries of the table of learned positions; 0 without one."""
        return (self.position_prefix + self.num_patches) * self.position_embedding

    @property
    def feature_width(self) -> int:
        """Channels of the pooled feature, before a head or projection."""
        return self.width * (2 if self.pool == "cls+avg" else 1)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head, `D`."""
        return self.width // self.heads

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks whose tokens a decoder reads, counted from 0."""
        return () if self.decoder is None else self.decoder.taps

    def blocks_at(self, *fractions: float) -> tuple[int, ...]:
        """Find the blocks at fractions of the depth, from block 1 on, each once."""
        last = self.depth - 1
        near = {round(self.depth * fraction) for fraction in fractions}
        return tuple(sorted({min(last, max(min(1, last), block)) for block in near}))

    @property
    def quarters(self) -> tuple[int, ...]:
        """Blocks at a quarter, half and three quarters of the depth, each once."""
        return tuple(sorted({self.depth * quarter // 4 for quarter in (1, 2, 3)}))

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

    Types are given by their names or as themselves, such as `jnp.bfloat16`; names are kept. Under
    "float8" linear layers multiply in e4m3, and all else is computed in bfloat16.

    Raises:
        InputError: for a value that is not accepted, or float64 where JAX does not compute in it.
    """

    called: ClassVar[str] = "{}"
    dtype: str = option("float32", "number format that blocks compute in", choices=DTYPES)
    param_dtype: str | None = option(
        None, "what the blocks' weights are stored in (default: as --dtype)", choices=STORED_DTYPES
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
        if self.float8 and self.param_dtype is not None:
            raise InputError("dtype 'float8' stores weights in float8; leave param_dtype out")

    @property
    def types(self) -> tuple[jnp.dtype, jnp.dtype]:
        """The types that blocks are computed in, and that their weights are stored in.

        With float8 they are those of all but linear layers.
        """
        dtype = "bfloat16" if self.float8 else self.dtype
        return jnp.dtype(dtype), jnp.dtype(self.param_dtype or dtype)

    @property
    def float8(self) -> bool:
        """Whether the blocks' linear layers multiply numbers in float8."""
        return self.dtype == "float8"


def _type_name(dtype: Any) -> Any:
    """Name a type such as `jnp.bfloat16`; names, and what is no type, stay as they are."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return dtype
