"""ATS for one image alone, in float64 NumPy, written from DESIGN.md."""

import jax
import jax.numpy as jnp
import numpy as np

from hvit_jax.models.vit import patchify


def layer_norm(x, weights, index=()):
    scale, bias = (np.float64(weights[name][index]) for name in ("scale", "bias"))
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def linear(x, weights, index=()):
    return x @ np.float64(weights["kernel"][index]) + np.float64(weights["bias"][index])


def sample(scores, points, budget):
    order = np.argsort(scores, kind="stable")
    sums = np.cumsum(scores[order])
    cdf = (sums - sums.min()) / (sums.max() - sums.min())
    start, j = cdf[cdf > 0].min(), np.arange(points)
    values = start + (j - start * j) / (points - 1)
    return order[np.unique(np.abs(values[:, None] - cdf).argmin(1))[-(budget - 1) :]]


def run_alone(config, parameters, image, *, blocks, max_tokens, residual):
    """Return one image's tokens after every block, and the patches that are left in the end."""
    weights = parameters["blocks"]
    x = linear(np.float64(patchify(image[None], config.patch_size)[0]), parameters["patch_embed"])
    x = np.concatenate([np.float64(parameters["class_token"])[None], x])
    x = x + np.float64(parameters["pos_embedding"])
    patches, outputs = np.arange(len(x)), []
    for block in range(config.depth):
        normal = layer_norm(x, weights["ln_1"], block)
        parts = linear(normal, weights["in_proj"], block)
        q, k, v = parts.reshape(len(x), 3, config.heads, -1).transpose(1, 2, 0, 3)
        scores = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim)
        attention = np.exp(scores - scores.max(-1, keepdims=True))
        kept, stays = np.arange(len(x)), x
        if block in blocks:
            total = attention.sum(-1, keepdims=True) + 1e-6
            attention = (attention + 1e-6 / len(x)) / total
            norms = np.sqrt((v**2).sum((0, 2)))
            patch_scores = (attention[:, 0].sum(0) * norms)[1:]
            points, budget = config.num_patches, max_tokens[blocks.index(block)]
            chosen = sample(patch_scores / patch_scores.sum(), points, budget)
            kept = np.concatenate([[0], chosen + 1])
            stays = normal[kept] if residual == "normalized" else x[kept]
        else:
            attention /= attention.sum(-1, keepdims=True)
        attended = (attention[:, kept] @ v).transpose(1, 0, 2).reshape(len(kept), -1)
        x = stays + linear(attended, weights["out_proj"], block)
        hidden = linear(layer_norm(x, weights["ln_2"], block), weights["linear_1"], block)
        hidden = np.float64(jax.nn.gelu(jnp.float32(hidden), approximate=False))
        x = x + linear(hidden, weights["linear_2"], block)
        patches = patches[kept]
        outputs.append(x)
    return outputs, patches
