"""Multiply-adds per image in the convention of the published tables.

One multiply-add counts as 1. A linear layer counts its bias, the patch convolution does not; layer
normalisation counts 4 an element, softmax 5, GELU, dropout (in evaluation too), residuals and other
element-wise products 1; reductions, sorts, gathers, comparisons, exp and log are free.
"""

from __future__ import annotations

from hvit_jax.config import ViTConfig

TABLE_CLASSES = 1000


def linear(rows: int, inputs: int, outputs: int) -> int:
    """Count a linear layer with bias."""
    return rows * outputs * (inputs + 1)


def queries_keys_values(config: ViTConfig, tokens: int) -> int:
    """Count ln_1 and the joint projection to q, k and v."""
    width = config.width
    return 4 * tokens * width + linear(tokens, width, 3 * width)


def attention(config: ViTConfig, queries: int, keys: int) -> int:
    """Count scaling of q, scores, softmax and the weighted sum of values."""
    products = 2 * queries * keys * config.width
    return queries * config.width + products + 5 * config.heads * queries * keys


def projection(config: ViTConfig, tokens: int) -> int:
    """Count the output projection, its dropout and the residual."""
    return linear(tokens, config.width, config.width) + 2 * tokens * config.width


def mlp(config: ViTConfig, tokens: int) -> int:
    """Count ln_2, both linear layers, GELU, two dropouts and the residual."""
    width, hidden = config.width, config.mlp_width
    layers = linear(tokens, width, hidden) + linear(tokens, hidden, width)
    return layers + tokens * (4 * width + 2 * hidden + 2 * width)


def block(config: ViTConfig, tokens: int, mlp_tokens: int) -> int:
    """Count a block whose attention runs on `tokens` and whose MLP runs on `mlp_tokens`."""
    return (
        queries_keys_values(config, tokens)
        + attention(config, tokens, tokens)
        + projection(config, tokens)
        + mlp(config, mlp_tokens)
    )


def stem_and_head(config: ViTConfig, tokens_out: int) -> int:
    """Count what surrounds the blocks: patches, position embedding, final LayerNorm, head."""
    width, patches = config.width, config.num_patches
    convolution = patches * width * 3 * config.patch_size**2
    head = linear(1, width, TABLE_CLASSES)
    return convolution + (patches + 1) * width + 4 * tokens_out * width + head
