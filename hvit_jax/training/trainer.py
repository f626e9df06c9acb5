"""One training step: loss, gradients of what is trained, update, average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, UInt8

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.data.preprocess import normalize
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.parameters import Tree, abstract_parameters, build_model
from hvit_jax.models.vit import ViT
from hvit_jax.reducers import Reducer
from hvit_jax.training.average import start_average, update_average
from hvit_jax.training.spread import spread, whole_block, whole_parameters

PARTS = ("whole", "head")
Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        step: steps done.
        parameters: all of the model's parameters, in float32.
        optimizer: the optimiser's state, of the trained parameters only.
        average: the moving average of the trained parameters, or None.
    """

    step: Int[Array, ""]
    parameters: Tree
    optimizer: optax.OptState
    average: Tree | None


@dataclass(frozen=True)
class Trainer:
    """What stays fixed during a run.

    Attributes:
        config: the model's sizes.
        reducer: the method to train under.
        optimizer: made by `make_optimizer`.
        dtype: what blocks are computed in; parameters stay in float32.
        label_smoothing: share of the target spread over all classes.
        part: what is trained, the "whole" model or its "head".
        accumulate: parts that a step takes its batch in, one after the other.
        remat: compute blocks again in the backward pass, instead of keeping what is in them.
        ema: decay of the parameters' moving average; 0 for none.
        placement: the devices that share a batch; None for one.
    """

    config: ViTConfig
    reducer: Reducer
    optimizer: optax.GradientTransformation
    dtype: str = "float32"
    label_smoothing: float = 0.0
    part: str = "whole"
    accumulate: int = 1
    remat: bool = False
    ema: float = 0.0
    placement: Placement | None = None

    def init(self, parameters: Tree) -> TrainState:
        """Make the state before the first step."""
        parameters = jax.tree.map(jnp.asarray, parameters)
        trained, _ = self._split(parameters)
        average = start_average(trained, self.ema)
        return TrainState(
            jnp.zeros((), jnp.int32), parameters, self.optimizer.init(trained), average
        )

    def result(self, state: TrainState) -> Tree:
        """Give the parameters that the run stands for: the averaged ones, where there are any."""
        return {**state.parameters, **(state.average or {})}

    def model(self, parameters: Tree) -> ViT:
        """Make the model around whole parameters."""
        return build_model(self.config, self.reducer, parameters, self._compute)

    @property
    def _compute(self) -> Compute:
        return Compute(dtype=self.dtype, param_dtype="float32", remat=self.remat)

    def _model_of_shares(self, parameters: Tree) -> ViT:
        """Make the model around one device's share of the parameters, if they are shared at all."""
        if self.placement is None or not self.placement.shard:
            return self.model(parameters)
        sharding = self.placement.sharding
        shapes = abstract_parameters(self.config)
        specs = jax.tree.map(lambda leaf: sharding(leaf.shape).spec, shapes)
        whole = whole_parameters(parameters, specs)
        gather = whole_block(specs["blocks"])
        return build_model(self.config, self.reducer, whole, self._compute, gather_weights=gather)

    def loss(
        self, parameters: Tree, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the smoothed cross entropy of a batch; then the same and the accuracy by name."""
        logits = self._model_of_shares(parameters)(normalize(pixels))
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1]), self.label_smoothing
        )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, {"loss": loss, "accuracy": (logits.argmax(-1) == labels).mean()}

    def step(
        self, state: TrainState, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, " B"]
    ) -> tuple[TrainState, Metrics]:
        """Take one step; to be compiled with the state donated."""
        trained, frozen = self._split(state.parameters)
        gradients = self.gradients
        if self.placement is not None:
            gradients = spread(gradients, self.placement, trained, frozen)
        grads, metrics = gradients(trained, frozen, pixels, labels)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, trained)
        trained = jax.tree.map(jnp.add, trained, updates)
        average = update_average(state.average, trained, state.step, self.ema)
        state = TrainState(state.step + 1, {**frozen, **trained}, optimizer, average)
        return state, metrics

    def gradients(
        self,
        trained: Tree,
        frozen: Tree,
        pixels: UInt8[Array, "B H W 3"],
        labels: Int[Array, " B"],
    ) -> tuple[Tree, Metrics]:
        """Compute the gradient of the trained parameters, and the metrics, over a batch.

        Args:
            trained: the parameters to differentiate by; nothing runs backward below them.
            frozen: the other parameters.
            pixels: pictures, as bytes.
            labels: their classes.
        """

        def of(pixels, labels):
            def loss(trained):
                return self.loss({**frozen, **trained}, pixels, labels)

            return jax.grad(loss, has_aux=True)(trained)

        if self.accumulate == 1:
            return of(pixels, labels)
        parts = _interleave(pixels, self.accumulate), _interleave(labels, self.accumulate)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, *(part[0] for part in parts)))
        total, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, of(*part)), None), zeros, parts
        )
        return jax.tree.map(lambda sums: sums / self.accumulate, total)

    def _split(self, parameters: Tree) -> tuple[Tree, Tree]:
        """Separate what is trained from what is not."""
        names = ("head",) if self.part == "head" else tuple(parameters)
        trained = {name: parameters[name] for name in names}
        return trained, {name: parameters[name] for name in parameters if name not in names}


def _interleave(batch: Array, parts: int) -> Array:
    """Cut (B, ...) into (parts, B / parts, ...), every `parts`-th row each.

    Unlike parts in a row, these need no exchange of rows where devices hold a share of B each.
    """
    return batch.reshape(-1, parts, *batch.shape[1:]).swapaxes(0, 1)
