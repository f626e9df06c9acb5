"""Heads that make a map of tokens: Segmenter's two, and DINOv2's for segments and depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvit_jax.config import Compute, Decoder, ViTConfig
from hvit_jax.models.block import LayerNorm, stack_blocks
from hvit_jax.ops.activations import gelu
from hvit_jax.ops.resizing import resize_map


class Tap(NamedTuple):
    """What a head reads of one block: patches on the full grid, and CLS."""

    patches: Float[Array, "B h w C"]
    cls: Float[Array, "B C"]


class LinearDecoder(nnx.Module):
    """One linear layer on every patch token."""

    def __init__(self, config: ViTConfig, decoder: Decoder, *, compute: Compute, rngs: nnx.Rngs):
        """Create the layer, in float32."""
        self.linear = nnx.Linear(config.width, decoder.outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N n"]:
        """Score every token."""
        return self.linear(x)


class MaskTransformer(nnx.Module):
    """Segmenter's decoder: classes are tokens too, and a mask is a patch's cosine with each.

    Strudel et al. 2021, "Segmenter: Transformer for Semantic Segmentation", arXiv 2105.05633.
    """

    def __init__(self, config: ViTConfig, decoder: Decoder, *, compute: Compute, rngs: nnx.Rngs):
        """Create the parameters; blocks in the model's types, the rest in float32."""
        width = config.width

        def matrix(*shape: int) -> nnx.Param:
            return nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), shape))

        def norm(size: int) -> LayerNorm:
            return LayerNorm(size, epsilon=decoder.norm_eps, dtype=jnp.float32, rngs=rngs)

        self.dtype, self.depth = compute.types[0], decoder.depth
        self.proj = nnx.Linear(width, width, rngs=rngs)
        self.class_tokens = matrix(decoder.outputs, width)
        block = decoder.block_config(width)
        (self.blocks,) = stack_blocks([decoder.depth], block, compute=compute, rngs=rngs)
        self.norm = norm(width)
        self.patch_projection = matrix(width, width)
        self.class_projection = matrix(width, width)
        self.mask_norm = norm(decoder.outputs)

    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N n"]:
        """Score every token, of which there may be fewer than patches."""
        patches, classes = x.shape[1], self.class_tokens[...]
        classes = jnp.broadcast_to(classes[None], (x.shape[0], *classes.shape))
        x = jnp.concatenate([self.proj(x), classes], axis=1).astype(self.dtype)
        graph, weights = nnx.split(self.blocks)
        x, _ = jax.lax.scan(lambda x, block: (nnx.merge(graph, block)(x), None), x, weights)
        x = self.norm(x.astype(self.class_tokens.dtype))
        tokens = _unit(x[:, :patches] @ self.patch_projection[...])
        classes = _unit(x[:, patches:] @ self.class_projection[...])
        return self.mask_norm(tokens @ classes.swapaxes(1, 2))


def _unit(x: Float[Array, "*rows C"]) -> Float[Array, "*rows C"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class BNLinear(nnx.Module):
    """DINOv2's linear head: channels normalised by stored statistics, then one linear layer.

    Oquab et al. 2024, arXiv 2304.07193. It reads the maps of its taps side by side.
    """

    def __init__(self, config: ViTConfig, decoder: Decoder, *, compute: Compute, rngs: nnx.Rngs):
        """Create the layer and its statistics, in float32."""
        channels = config.width * len(decoder.taps)
        self.epsilon = decoder.norm_eps
        self.mean = nnx.Param(jnp.zeros(channels))
        self.variance = nnx.Param(jnp.ones(channels))
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.linear = nnx.Linear(channels, decoder.outputs, rngs=rngs)

    def __call__(self, taps: Sequence[Tap]) -> Float[Array, "B h w n"]:
        """Score every patch."""
        x = jnp.concatenate([tap.patches for tap in taps], axis=-1)
        factor = jax.lax.rsqrt(self.variance[...] + self.epsilon) * self.scale[...]
        x = (x - _row(self.mean[...])) * _row(factor) + _row(self.bias[...])
        return self.linear(x)


def _row(values: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return values.reshape(1, 1, 1, -1)


def _with_cls(tap: Tap) -> Float[Array, "B h w D"]:
    """Put the block's CLS beside every patch."""
    cls = jnp.broadcast_to(tap.cls[:, None, None], tap.patches.shape)
    return jnp.concatenate([tap.patches, cls], axis=-1)


class DepthLinear(nnx.Module):
    """DINOv2's linear depth: each patch spreads its depth over bins (Bhat et al. 2021)."""

    ENLARGED = 4  # Times, before the bins are scored.

    def __init__(self, config: ViTConfig, decoder: Decoder, *, compute: Compute, rngs: nnx.Rngs):
        """Create the layer, in float32."""
        self.range = decoder.depth_range
        channels = 2 * config.width * len(decoder.taps)
        self.linear = nnx.Linear(channels, decoder.outputs, rngs=rngs)

    def __call__(self, taps: Sequence[Tap]) -> Float[Array, "B h w 1"]:
        """Estimate depth in metres, on a grid four times as fine as the patches'."""
        x = jnp.concatenate([_with_cls(tap) for tap in taps], axis=-1)
        rows, columns = x.shape[1:3]
        # The layer acts on each place alone, so that its few bins are enlarged instead.
        scores = resize_map(self.linear(x), (self.ENLARGED * rows, self.ENLARGED * columns))
        scores = jax.nn.relu(scores) + 0.1
        shares = scores / scores.sum(-1, keepdims=True)
        bins = jnp.linspace(*self.range, scores.shape[-1], dtype=scores.dtype)
        return (shares * _row(bins)).sum(-1, keepdims=True).clip(*self.range)


class Unfold(nnx.Module):
    """A transposed convolution whose stride is its size: every place becomes a square of them."""

    def __init__(self, channels: int, side: int, *, rngs: nnx.Rngs):
        """Create the kernel (C, side, side, C) and the bias."""
        shape = (channels, side, side, channels)
        self.kernel = nnx.Param(channels**-0.5 * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        """Enlarge a map."""
        side = self.kernel.shape[1]
        x = jnp.einsum("bhwi,iyxo->bhywxo", x, self.kernel[...])
        batch, rows, _, columns, _, channels = x.shape
        return x.reshape(batch, rows * side, columns * side, channels) + _row(self.bias[...])


class Residual(nnx.Module):
    """Two convolutions, each behind a relu, added to what enters."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        """Create the convolutions, without biases."""
        self.conv_1 = _conv(channels, channels, 3, rngs=rngs, use_bias=False)
        self.conv_2 = _conv(channels, channels, 3, rngs=rngs, use_bias=False)

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Refine a map."""
        return x + self.conv_2(jax.nn.relu(self.conv_1(jax.nn.relu(x))))


def _conv(inputs: int, outputs: int, side: int, *, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    half = side // 2
    return nnx.Conv(
        inputs, outputs, (side, side), padding=((half, half), (half, half)), rngs=rngs, **options
    )


class Fusion(nnx.Module):
    """One step of DPT: a map is added to the coarser ones before it, refined and enlarged."""

    def __init__(self, channels: int, *, first: bool, rngs: nnx.Rngs):
        """Create the convolutions; the first step has no map to refine before it is added."""
        self.of_tap = None if first else Residual(channels, rngs=rngs)
        self.of_sum = Residual(channels, rngs=rngs)
        self.project = _conv(channels, channels, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w C"], tap: Float[Array, "B H W C"] | None
    ) -> Float[Array, "B rows columns C"]:
        """Fuse what came before with the map of a tap; None: there is none to add."""
        if self.of_tap is not None and tap is not None:
            rows, columns = x.shape[1:3]
            x = x + self.of_tap(resize_map(tap, (rows, columns)))
        x = self.of_sum(x)
        twice = (2 * x.shape[1], 2 * x.shape[2])
        return self.project(resize_map(x, twice, "bilinear_corners"))


class DepthDPT(nnx.Module):
    """DPT's depth, which fuses four taps from coarse to fine.

    Ranftl et al. 2021, "Vision Transformers for Dense Prediction", arXiv 2103.13413, as DINOv2 has
    it.
    """

    def __init__(self, config: ViTConfig, decoder: Decoder, *, compute: Compute, rngs: nnx.Rngs):
        """Create the convolutions, in float32."""
        width, channels, made = config.width, decoder.channels, decoder.tap_channels
        first, second, _, fourth = made
        self.range = decoder.depth_range
        self.readout = nnx.List([nnx.Linear(2 * width, width, rngs=rngs) for _ in made])
        self.project = nnx.List([nnx.Linear(width, each, rngs=rngs) for each in made])
        self.enlarge_0 = Unfold(first, 4, rngs=rngs)
        self.enlarge_1 = Unfold(second, 2, rngs=rngs)
        self.shrink_3 = _conv(fourth, fourth, 3, rngs=rngs, strides=2)
        self.convs = nnx.List(
            [_conv(each, channels, 3, rngs=rngs, use_bias=False) for each in made]
        )
        self.fusion = nnx.List([Fusion(channels, first=step == 0, rngs=rngs) for step in range(4)])
        self.smooth = _conv(channels, channels, 3, rngs=rngs)
        self.head_0 = _conv(channels, channels // 2, 3, rngs=rngs)
        self.head_1 = _conv(channels // 2, 32, 3, rngs=rngs)
        self.head_2 = _conv(32, 1, 1, rngs=rngs)

    def __call__(self, taps: Sequence[Tap]) -> Float[Array, "B h w 1"]:
        """Estimate depth in metres, on a finer grid than the patches'."""
        maps = [
            project(gelu(readout(_with_cls(tap))))
            for tap, readout, project in zip(taps, self.readout, self.project, strict=True)
        ]
        sizes = (self.enlarge_0, self.enlarge_1, lambda x: x, self.shrink_3)
        maps = [conv(size(x)) for conv, size, x in zip(self.convs, sizes, maps, strict=True)]
        x = self.fusion[0](maps[3], None)
        for step in (1, 2, 3):
            x = self.fusion[step](x, maps[3 - step])
        x = self.head_0(jax.nn.relu(self.smooth(x)))
        x = resize_map(x, (2 * x.shape[1], 2 * x.shape[2]), "bilinear_corners")
        x = self.head_2(jax.nn.relu(self.head_1(x)))
        return (jax.nn.relu(x) + self.range[0]).clip(*self.range)


DECODERS = {
    "linear": LinearDecoder,
    "mask": MaskTransformer,
    "bn_linear": BNLinear,
    "depth_linear": DepthLinear,
    "depth_dpt": DepthDPT,
}


def make_decoder(config: ViTConfig, *, compute: Compute, rngs: nnx.Rngs) -> Any:
    """Make the head that a configuration describes; None without one."""
    if config.decoder is None:
        return None
    return DECODERS[config.decoder.kind](config, config.decoder, compute=compute, rngs=rngs)
