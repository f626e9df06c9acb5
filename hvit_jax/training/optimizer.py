"""The optimiser: AdamW with warm-up, cosine decay and gradient clipping."""

from __future__ import annotations

import jax
import optax

from hvit_jax.models.parameters import Tree


def make_optimizer(
    *, learning_rate: float, weight_decay: float, warmup_steps: int, total_steps: int
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for a fixed number of steps.

    Args:
        learning_rate: the highest rate, reached after warm-up.
        weight_decay: applied to weight matrices only, not to biases, norms and embeddings.
        warmup_steps: steps of linear warm-up from 0.
        total_steps: steps after which the cosine reaches 0.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(total_steps, warmup_steps + 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=weight_decay, mask=_decayed),
    )


def _decayed(parameters: Tree) -> Tree:
    """Mark the weight matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1] == jax.tree_util.DictKey("kernel"), parameters
    )
