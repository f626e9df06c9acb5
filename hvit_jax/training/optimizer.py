"""The optimiser: AdamW with warm-up, cosine decay, gradient clipping and a rate for every layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from hvit_jax.models.parameters import Tree
from hvit_jax.training.config import TrainConfig

_BEFORE_BLOCKS = ("patch_embed", "class_token", "pos_embedding")


def make_optimizer(config: TrainConfig, pictures: int) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a fixed number of steps.

    The rate rises from 0 in the steps of warm-up and falls back to 0 as a cosine. Weight decay is
    that of weight matrices only, not of biases, norms and embeddings.

    Args:
        config: the recipe.
        pictures: to train on.
    """
    total, warmup = config.total_steps(pictures), config.warmup_steps(pictures)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total, warmup + 1)
    )
    parts = [
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=_decayed),
    ]
    if config.layer_decay != 1:
        parts.append(
            optax.stateless(lambda updates, _: _scale_by_layer(updates, config.layer_decay))
        )
    return optax.chain(*parts)


def _scale_by_layer(updates: Any, decay: float) -> Any:
    """Shrink updates towards the input, as fine-tuning in BEiT does (arXiv 2106.08254).

    The head and the last norm keep their update; block `i` of `depth` is scaled by
    `decay ** (depth - i)`, the embeddings by `decay ** (depth + 1)`.

    Args:
        updates: a tree of parameters, blocks stacked along the first axis.
        decay: above 0 and at most 1.
    """

    def scale(path, leaf):
        name = path[0].key
        if name == "blocks":
            below_head = jnp.arange(len(leaf), 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))
            return leaf * decay**below_head
        return leaf * decay ** (depth + 1) if name in _BEFORE_BLOCKS else leaf

    depth = len(jax.tree.leaves(updates["blocks"])[0])
    return jax.tree_util.tree_map_with_path(scale, updates)


def _decayed(parameters: Tree) -> Tree:
    """Mark the weight matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1] == jax.tree_util.DictKey("kernel"), parameters
    )
