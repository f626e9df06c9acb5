"""Logistic regression on frozen features: the linear probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.heads import Linear, in_chunks

# What is tried where no weight decay is given, from the strongest on.
WEIGHT_DECAYS = tuple(10.0**-exponent for exponent in range(7))
HELD_OUT = 10  # Every tenth training picture then tells which is best.
MOST_STEPS = 1000
ENOUGH = 1e-4  # The largest entry of a gradient with which a fit ends.
_EPSILON = 1e-6  # Added to a feature's variance before it is divided by its deviation.
_OPTIMIZER = optax.lbfgs()

Weights = tuple[Float[Array, "C classes"], Float[Array, " classes"]]


@dataclass(frozen=True)
class Fit:
    """A linear probe, and how it came about.

    Attributes:
        head: for features as they are.
        weight_decay: that it was fitted with.
        loss: the mean cross entropy on the training pictures.
        steps: of L-BFGS.
    """

    head: Linear
    weight_decay: float
    loss: float
    steps: int


def fit_logistic(
    features: Float[np.ndarray, "N C"],
    labels: Int[np.ndarray, " N"],
    classes: int,
    placement: Placement,
    *,
    weight_decay: float | None = None,
    on_step: Callable[[int, str], None] = lambda step, text: None,
) -> Fit:
    """Fit a linear classifier of features by L-BFGS; nothing in it is random.

    The mean cross entropy plus half the weight decay times the squared length of the kernel is
    minimised, after every feature has got the mean 0 and the variance 1. The bias is not decayed.

    Args:
        features: one row a training picture.
        labels: their classes.
        classes: how many there are.
        placement: the devices that share the pictures.
        weight_decay: None: of 1, 0.1, ... 1e-6 the one with the lowest loss on every tenth picture,
            which is held out meanwhile; the fit itself is to all of them.
        on_step: is told after every step of a fit how many they are, and which fit it is.

    Raises:
        InputError: if there are too few pictures to choose the weight decay.
    """
    chunks, places = in_chunks(features, labels, multiple=placement.devices)
    data = _Data(placement, placement.divide(chunks, axis=1), places)
    if weight_decay is None:
        if len(labels) < HELD_OUT:
            raise InputError(
                f"{len(labels)} training pictures are too few to choose a weight decay by; give "
                "--probe-weight-decay X"
            )
        weight_decay = _choose(data, classes, on_step)
    start = data.zeros(classes)
    weights, steps = data.fit(start, places, weight_decay, on_step)
    loss = data.loss(weights, places)
    return Fit(Linear(*data.unscaled(weights)), weight_decay, loss, steps)


def _choose(data: _Data, classes: int, on_step: Callable[[int, str], None]) -> float:
    """Find the weight decay whose fit to nine tenths of the pictures suits the others best.

    Each fit begins with the last one's weights. Once the loss rises, weaker decays are not tried.
    """
    held = (np.arange(data.places.size) % HELD_OUT == 0).reshape(data.places.shape)
    seen, unseen = (np.where(left, data.places, -1) for left in (~held, held))
    weights, best, least = data.zeros(classes), WEIGHT_DECAYS[0], np.inf
    for weight_decay in WEIGHT_DECAYS:
        weights, _ = data.fit(weights, seen, weight_decay, on_step)
        loss = data.loss(weights, unseen)
        if not loss < least:
            break
        best, least = weight_decay, loss
    return best


class _Data:
    """Training pictures on the devices; rows with the label -1 do not count."""

    def __init__(self, placement: Placement, features: Array, places: np.ndarray):
        self.placement, self.places = placement, places
        self._features = features
        self._scale = _moments(features, self._put(places))

    def _put(self, places: np.ndarray) -> Array:
        return self.placement.divide(places, axis=1)

    def zeros(self, classes: int) -> Weights:
        width = self._features.shape[-1]
        zeros = (np.zeros((width, classes), np.float32), np.zeros(classes, np.float32))
        return self.placement.replicate(zeros)

    def fit(
        self,
        weights: Weights,
        places: np.ndarray,
        weight_decay: float,
        on_step: Callable[[int, str], None],
    ) -> tuple[Weights, int]:
        """Minimise from given weights on; the new ones, and how many steps it took."""
        data = (self._features, self._put(places), self._scale)
        state = _OPTIMIZER.init(weights)
        step, going = 0, True
        while going and step < MOST_STEPS:
            weights, state, slope, progress = _step(weights, state, data, weight_decay)
            step, going = step + 1, float(slope) > ENOUGH and float(progress) > 0
            on_step(step, f"weight decay {weight_decay:g}")
        return weights, step

    def loss(self, weights: Weights, places: np.ndarray) -> float:
        return float(_mean_loss(weights, (self._features, self._put(places), self._scale)))

    def unscaled(self, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Give a kernel and bias for features as they are."""
        kernel, bias = self.placement.gather(weights)
        mean, factor = self.placement.gather(self._scale)
        kernel = factor[:, None] * kernel
        return kernel, bias - mean @ kernel


@jax.jit
def _moments(features, labels):
    """Give every feature's mean, and one over its deviation."""
    there = (labels >= 0)[..., None]
    count = there.sum()
    mean = jnp.where(there, features, 0).sum((0, 1)) / count
    variance = jnp.where(there, (features - mean) ** 2, 0).sum((0, 1)) / count
    return mean, jax.lax.rsqrt(variance + _EPSILON)


@jax.jit
def _mean_loss(weights, data):
    """Take the mean cross entropy, chunk by chunk: logits of all pictures may not fit."""
    features, labels, (mean, factor) = data

    @jax.checkpoint
    def add(total, chunk):
        scaled, right = (chunk[0] - mean) * factor, chunk[1]
        logits = jnp.dot(scaled, weights[0], precision=jax.lax.Precision.HIGHEST) + weights[1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(right, 0))
        return total + jnp.where(right >= 0, losses, 0).sum(), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (features, labels))
    return total / (labels >= 0).sum()


@jax.jit
def _step(weights: Weights, state: Any, data: Any, weight_decay: Any):
    """Take one step of L-BFGS.

    Returns:
        The weights, L-BFGS' state, the largest entry of the gradient there, and by how much the
        objective has fallen: 0 where float32 cannot tell any more.
    """

    def objective(weights):
        return _mean_loss(weights, data) + 0.5 * weight_decay * (weights[0] ** 2).sum()

    value, slope = optax.value_and_grad_from_state(objective)(weights, state=state)
    updates, state = _OPTIMIZER.update(
        slope, state, weights, value=value, grad=slope, value_fn=objective
    )
    weights = jax.tree.map(jnp.add, weights, updates)
    largest = jnp.maximum(*(jnp.abs(each).max() for each in optax.tree.get(state, "grad")))
    return weights, state, largest, value - optax.tree.get(state, "value")
