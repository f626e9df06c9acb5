"""Multiply-adds per image in the convention of the published tables.

One multiply-add counts as 1. A linear layer counts its bias, the patch convolution does not; layer
normalisation counts 4 an element, softmax 5, GELU, dropout (in evaluation too), residuals and other
element-wise products 1; reductions, sorts, gathers, comparisons, exp and log are free.
"""

from __future__ import annotations

from hvit_jax.config import ViTConfig

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


def stem_and_head(config: ViTConfig, tokens_out: int) -> int:
    """Count what surrounds the blocks: patches, positions, the norms around them, pooling, head."""
    width, patches = config.width, config.num_patches
    convolution = patches * width * 3 * config.patch_size**2
    before = (config.position_embedding + 4 * config.pre_norm) * config.num_tokens * width
    after = (
        4 * tokens_out * width * config.final_norm + 4 * config.feature_width * config.pooled_norm
    )
    pool = attention_pool(config, tokens_out) if config.pool == "map" else 0
    head = linear(1, config.feature_width, TABLE_CLASSES)
    if config.projection:
        head = linear(1, config.feature_width, config.projection, bias=False)
    return convolution + before + after + pool + head


def attention_pool(config: ViTConfig, tokens: int) -> int:
    """Count keys and values of the tokens, one query, and the MLP of one token."""
    width, hidden = config.width, config.pool_mlp_width or config.mlp_width
    tokens -= 0 if config.pool_prefix else config.prefix_tokens
    heads = config.pool_heads or config.heads
    products = linear(1, width, width) + 2 * linear(tokens, width, width)
    core = width + 2 * tokens * width + 5 * heads * tokens
    mlp = linear(1, width, hidden) + linear(1, hidden, width) + 5 * width + hidden
    return products + core + linear(1, width, width) + mlp
