"""Multiply-adds per image in the convention of the published tables.

One multiply-add counts as 1. A linear layer counts its bias, the patch convolution does not; layer
normalisation counts 4 an element, softmax 5, GELU, dropout (in evaluation too), residuals and other
element-wise products 1; reductions, sorts, gathers, comparisons, exp and log are free.
"""

from __future__ import annotations

from hvit_jax.config import Decoder, ViTConfig

TABLE_CLASSES = 1000


def linear(rows: int, inputs: int, outputs: int, *, bias: bool = True) -> int:
    """Count a linear layer."""
    return rows * outputs * (inputs + bias)


def queries_keys_values(config: ViTConfig, tokens: int) -> int:
    """Count ln_1, the projections to q, k and v, and what is done to q and k."""
    width, biases = config.width, {"all": 3, "qv": 2, "none": 0}[config.qkv_bias]
    products = 3 * linear(tokens, width, width, bias=False) + biases * tokens * width
    norms = 8 * tokens * width * config.qk_norm
    turning = 6 * (tokens - config.prefix_tokens) * width * (config.rope is not None)
    return 4 * tokens * width + products + norms + turning


def attention(config: ViTConfig, queries: int, keys: int) -> int:
    """Count scaling of q, scores, softmax and the weighted sum of values."""
    products = 2 * queries * keys * config.width
    return queries * config.width + products + 5 * config.heads * queries * keys


def projection(config: ViTConfig, tokens: int) -> int:
    """Count the output projection, its scale, its dropout and the residual."""
    after = (2 + config.layer_scale) * tokens * config.width
    return linear(tokens, config.width, config.width) + after


def mlp(config: ViTConfig, tokens: int) -> int:
    """Count ln_2, the linear layers, the activation, two dropouts, the scale and the residual."""
    width, hidden = config.width, config.mlp_width
    inner = (1 + config.gated) * linear(tokens, width, hidden)
    layers = inner + linear(tokens, hidden, width)
    of_hidden = 2 + config.gated + 4 * config.mlp_norm
    return layers + tokens * (of_hidden * hidden + (6 + config.layer_scale) * width)


def block(config: ViTConfig, tokens: int, mlp_tokens: int) -> int:
    """Count a block whose attention runs on `tokens` and whose MLP runs on `mlp_tokens`."""
    return (
        queries_keys_values(config, tokens)
        + attention(config, tokens, tokens)
        + projection(config, tokens)
        + mlp(config, mlp_tokens)
    )


def nearest_sums(config: ViTConfig, places: int, tokens: int, channels: int) -> int:
    """Count what spreads tokens over places: distances, temperature, norm, division, sum."""
    pairs = places * tokens
    return (places + tokens + pairs) * config.width + 3 * pairs + pairs * (3 + channels)


def stem_and_head(config: ViTConfig, tokens_out: int, patches_read: int) -> int:
    """Count what surrounds the blocks: patches, positions, norms, and what reads the tokens.

    Of a decoder, enlarging its map to the picture's size is not counted.

    Args:
        config: the model's sizes.
        tokens_out: tokens that leave the last block.
        patches_read: patch tokens that a decoder reads.
    """
    width, patches = config.width, config.num_patches
    convolution = patches * width * 3 * config.patch_size**2
    before = (config.position_embedding + 4 * config.pre_norm) * config.num_tokens * width
    norm = 4 * tokens_out * width * config.final_norm
    end = _pool_and_head(config, tokens_out)
    if config.decoder is not None:
        end = _decoder(config, config.decoder, patches_read)
    return convolution + before + norm + end


def _pool_and_head(config: ViTConfig, tokens: int) -> int:
    pool = attention_pool(config, tokens) if config.pool == "map" else 0
    head = linear(1, config.feature_width, TABLE_CLASSES)
    if config.projection:
        head = linear(1, config.feature_width, config.projection, bias=False)
    return 4 * config.feature_width * config.pooled_norm + pool + head


def _decoder(config: ViTConfig, decoder: Decoder, tokens: int) -> int:
    """Count a head that makes a map, of so many patch tokens if it reads tokens."""
    width, patches, taps = config.width, config.num_patches, len(decoder.taps)
    if decoder.kind == "linear":
        return linear(tokens, width, decoder.outputs)
    if decoder.kind == "mask":
        return _mask_transformer(width, decoder, tokens)
    if decoder.kind == "bn_linear":
        return patches * taps * 2 * width + linear(patches, taps * width, decoder.outputs)
    if decoder.kind == "depth_linear":
        enlarged = 16 * patches * decoder.outputs
        return linear(patches, 2 * taps * width, decoder.outputs) + 4 * enlarged
    return _dpt(width, decoder, patches)


def _mask_transformer(width: int, decoder: Decoder, tokens: int) -> int:
    all_tokens = tokens + decoder.outputs
    blocks = decoder.depth * block(decoder.block_config(width), all_tokens, all_tokens)
    projections = linear(all_tokens, width, width, bias=False)
    masks = tokens * decoder.outputs * (width + 4)
    norms = (4 + 2) * all_tokens * width
    return linear(tokens, width, width) + blocks + projections + masks + norms


def _dpt(width: int, decoder: Decoder, patches: int) -> int:
    """Count DPT's convolutions; its maps have 16, 4, 1 and 1/4 places a patch, then twice the side.

    Activations and enlarging are left out: they are a thousandth of it.
    """
    channels, total = decoder.channels, 0
    places = (16 * patches, 4 * patches, patches, patches // 4)
    for at, here in zip(places, decoder.tap_channels, strict=True):
        total += linear(patches, 2 * width, width) + linear(patches, width, here)
        total += linear(at, 9 * here, channels, bias=False)
    first, second, _, fourth = decoder.tap_channels
    total += linear(16 * patches, first, first) + linear(4 * patches, second, second)
    total += linear(patches // 4, 9 * fourth, fourth)
    for step, at in enumerate(reversed(places)):
        convolutions = 2 if step == 0 else 4
        total += convolutions * linear(at, 9 * channels, channels, bias=False)
        total += linear(4 * at, channels, channels)
    finest = 4 * places[0]
    total += linear(finest, 9 * channels, channels) + linear(finest, 9 * channels, channels // 2)
    return total + linear(4 * finest, 9 * channels // 2, 32) + linear(4 * finest, 32, 1)


def attention_pool(config: ViTConfig, tokens: int) -> int:
    """Count keys and values of the tokens, one query, and the MLP of one token."""
    width, hidden = config.width, config.pool_mlp_width or config.mlp_width
    tokens -= 0 if config.pool_prefix else config.prefix_tokens
    heads = config.pool_heads or config.heads
    products = linear(1, width, width) + 2 * linear(tokens, width, width)
    core = width + 2 * tokens * width + 5 * heads * tokens
    mlp = linear(1, width, hidden) + linear(1, hidden, width) + 5 * width + hidden
    return products + core + linear(1, width, width) + mlp
