"""A moving average of the parameters, which often classifies better than the parameters do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hvit_jax.models.parameters import Tree


def start_average(parameters: Tree, decay: float) -> Tree | None:
    """Copy the parameters, so that the copy can be donated beside them; None for a decay of 0."""
    return jax.tree.map(jnp.copy, parameters) if decay else None


def update_average(
    average: Tree | None, parameters: Tree, step: Int[Array, ""], decay: float
) -> Tree | None:
    """Move an exponential average (Polyak and Juditsky 1992) towards the parameters.

    The decay is at most `(1 + step) / (10 + step)`: early on, when parameters still change much,
    the average looks back over few steps only.

    Args:
        average: the average so far, or None where none is kept.
        parameters: the parameters after the step.
        step: steps done before it.
        decay: the share of the old average that is kept.
    """
    if average is None:
        return None
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: new + kept * (old - new), average, parameters)
