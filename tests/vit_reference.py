"""A plain vision transformer in float64 NumPy, part by part, for one image at a time.

It follows the formulas of the papers and libraries, and shares no code with the package.
"""

import jax
import numpy as np
import scipy.special


def activate(x, name):
    if name == "gelu":
        return x / 2 * (1 + scipy.special.erf(x / np.sqrt(2)))
    if name == "gelu_tanh":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return x / (1 + np.exp({"quick_gelu": -1.702, "silu": -1.0}[name] * x))


def linear(x, weights):
    return x @ weights["kernel"] + weights.get("bias", 0)


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(q, k, v, heads, key_bias=0):
    """Attend with all heads: (queries, C), (keys, C), (keys, C)."""
    q, k, v = (x.reshape(len(x), heads, -1).swapaxes(0, 1) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + key_bias
    return (softmax(scores) @ v).swapaxes(0, 1).reshape(q.shape[1], -1)


def grid_places(rope, grid):
    """Row and column coordinates of every patch, in the units of the periods: (P, 2)."""
    places = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            if rope.coordinates == "centred":
                pair = [2 * (i + 0.5) / n - 1 for i, n in zip((row, column), grid, strict=True)]
                places.append([2 * np.pi * each for each in pair])
            else:
                pair = zip((row, column), grid, rope.reference, strict=True)
                places.append([(i + rope.offset) / n * size for i, n, size in pair])
    return np.array(places)


def rotate(x, places, rope):
    """Turn the vectors of one head, (P, D): `x cos + rot(x) sin`."""
    axes = places if rope.first_axis == "y" else places[:, ::-1]
    angles = np.concatenate([axes[:, i, None] / np.array(rope.periods) for i in (0, 1)], axis=1)
    if rope.interleaved:
        angles, turned = np.repeat(angles, 2, axis=1), np.empty_like(x)
        turned[:, ::2], turned[:, 1::2] = -x[:, 1::2], x[:, ::2]
    else:
        angles, half = np.concatenate([angles, angles], axis=1), x.shape[1] // 2
        turned = np.concatenate([-x[:, half:], x[:, :half]], axis=1)
    return x * np.cos(angles) + turned * np.sin(angles)


class Reference:
    """The model of a configuration and a tree of parameters."""

    def __init__(self, config, parameters):
        self.config = config
        self.weights = jax.tree.map(np.float64, parameters)

    def norm(self, x, weights):
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return (
            centred / np.sqrt(variance + self.config.norm_eps) * weights["scale"] + weights["bias"]
        )

    def embed(self, image):
        """What enters the first block: (N, C)."""
        config, weights, patches = self.config, self.weights, []
        side = config.patch_size
        for row in range(config.grid[0]):
            for column in range(config.grid[1]):
                rows, columns = (slice(i * side, (i + 1) * side) for i in (row, column))
                patches.append(np.float64(image)[rows, columns].ravel())
        names = ("class_token", "distillation_token", "register_tokens")
        prefix = [np.atleast_2d(weights[name]) for name in names if name in weights]
        prefix = np.concatenate([np.zeros((0, config.width)), *prefix])
        patches = linear(np.array(patches), weights["patch_embed"])
        if config.position_embedding:
            table, covered = weights["pos_embedding"], config.position_prefix
            prefix[:covered] += table[:covered]
            patches = patches + table[covered:]
        x = np.concatenate([prefix, patches])
        return self.norm(x, weights["ln_pre"]) if config.pre_norm else x

    def qkv(self, index, x, places=None):
        """Queries, keys and values of one block, each (N, C)."""
        config, block = self.config, self.block_weights(index)
        parts = np.split(linear(self.norm(x, block["ln_1"]), block["in_proj"]), 3, axis=1)
        q, k = (each.reshape(len(x), config.heads, -1) for each in parts[:2])
        if config.qk_norm:
            q, k = self.norm(q, block["q_norm"]), self.norm(k, block["k_norm"])
        if config.rope is not None and places is not None:
            first = len(x) - len(places)
            for head in range(config.heads):
                for each in (q, k):
                    each[first:, head] = rotate(each[first:, head], places, config.rope)
        return q.reshape(len(x), -1), k.reshape(len(x), -1), parts[2]

    def attention(self, index, x, places=None):
        """The attention weights of one block: (heads, N, N)."""
        heads = (len(x), self.config.heads, -1)
        q, k, _ = (each.reshape(heads).swapaxes(0, 1) for each in self.qkv(index, x, places))
        return softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))

    def block_weights(self, index):
        return jax.tree.map(lambda leaf: leaf[index], self.weights["blocks"])

    def block(self, index, x, places=None, key_bias=0):
        """One block on some tokens, the prefix first; `places` are those of its patches."""
        block = self.block_weights(index)
        attended = attend(*self.qkv(index, x, places), self.config.heads, key_bias)
        x = x + linear(attended, block["out_proj"]) * block.get("ls_1", 1)
        return x + self.mlp(index, x)

    def mlp(self, index, x):
        config, block = self.config, self.block_weights(index)
        hidden = linear(self.norm(x, block["ln_2"]), block["linear_1"])
        if config.gated:
            gate, up = np.split(hidden, 2, axis=1)
            hidden = activate(gate, config.activation) * up
        else:
            hidden = activate(hidden, config.activation)
        hidden = self.norm(hidden, block["mlp_ln"]) if config.mlp_norm else hidden
        return linear(hidden, block["linear_2"]) * block.get("ls_2", 1)

    def run(self, image):
        """All tokens after every block, without reduction."""
        x, places, steps = self.embed(image), None, []
        if self.config.rope is not None:
            places = grid_places(self.config.rope, self.config.grid)
        for index in range(self.config.depth):
            x = self.block(index, x, places)
            steps.append(x)
        return steps

    def final(self, x):
        """Final tokens."""
        return self.norm(x, self.weights["ln"]) if self.config.final_norm else x

    def pooled(self, x, sizes=None):
        """The feature of final tokens, of which each patch counts as often as `sizes` says."""
        config, first = self.config, self.config.prefix_tokens
        sizes = np.ones(len(x) - first) if sizes is None else np.float64(sizes)
        x = x if config.pool_before_norm else self.final(x)
        mean = (x[first:] * sizes[:, None]).sum(0) / sizes.sum()
        if config.pool == "map":
            sizes = np.concatenate([np.ones(first), sizes]) if config.pool_prefix else sizes
            feature = self.attention_pool(x if config.pool_prefix else x[first:], sizes)
        else:
            feature = {
                "cls": lambda: x[0],
                "avg": lambda: mean,
                "cls+avg": lambda: np.concatenate([x[0], mean]),
                "two heads": lambda: (x[0] + x[1]) / 2,
            }[config.pool]()
        return self.norm(feature, self.weights["pooled_ln"]) if config.pooled_norm else feature

    def attention_pool(self, x, sizes):
        config, pool = self.config, self.weights["pool"]
        kernels = np.split(pool["in_proj"]["kernel"], 3, axis=1)
        biases = np.split(pool["in_proj"]["bias"], 3)
        q, k, v = (
            each @ kernel + bias
            for each, kernel, bias in zip((pool["probe"][None], x, x), kernels, biases, strict=True)
        )
        seen = sizes > 0
        y = attend(q, k[seen], v[seen], config.pool_heads or config.heads, np.log(sizes[seen]))[0]
        y = linear(y, pool["out_proj"])
        hidden = activate(linear(self.norm(y, pool["ln"]), pool["linear_1"]), config.activation)
        return y + linear(hidden, pool["linear_2"])

    def output(self, x, sizes=None):
        """What the model says of the tokens after its last block."""
        if self.config.pool == "two heads":
            first, second, *_ = self.final(x)
            first = linear(first, self.weights["head"])
            return (first + linear(second, self.weights["distillation_head"])) / 2
        feature = self.pooled(x, sizes)
        for name in ("projection", "head"):
            feature = linear(feature, self.weights[name]) if name in self.weights else feature
        return feature
