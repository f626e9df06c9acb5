"""One training step: loss, gradients of what is trained, update, moving average, sums."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Num, UInt8

from hvit_jax.config import Compute, ViTConfig
from hvit_jax.data.preprocess import normalize
from hvit_jax.dense.metrics import IGNORED
from hvit_jax.distributed.placement import Placement
from hvit_jax.models.parameters import Tree, abstract_parameters, build_model
from hvit_jax.models.vit import ViT
from hvit_jax.pictures import Preprocessing, Windows
from hvit_jax.reducers import Reducer
from hvit_jax.training.augment import mix
from hvit_jax.training.sharding import gather_block, gather_parameters, on_all_devices

Metrics = dict[str, Float[Array, ""]]
HEADS = ("head", "distillation_head")
_BEFORE_BLOCKS = ("patch_embed", "class_token", "distillation_token", "register_tokens")
_BEFORE_BLOCKS += ("pos_embedding", "ln_pre")


class TrainState(NamedTuple):
    """Everything that must be the same after a resume.

    Order and augmentation of the pictures follow from the run's seed and `step` alone.
    """

    step: Int[Array, ""]  # Steps done.
    parameters: Tree  # All of the model's, in float32.
    optimizer: optax.OptState  # Of the trained parameters only, as is the moving average.
    average: Tree | None
    sums: Metrics  # `loss` and `accuracy` of the `steps` since the last row of metrics.csv.


@dataclass(frozen=True)
class Trainer:
    """What stays fixed during a run."""

    sizes: ViTConfig
    reducer: Reducer  # Resolved for `sizes`.
    optimizer: optax.GradientTransformation  # Of what is trained.
    placement: Placement
    compute: Compute = Compute()
    preprocessing: Preprocessing = Preprocessing()
    windows: Windows = Windows()  # That pictures are validated by, of models that make maps.
    head_only: bool = False  # Train the classification head, or both of a distilled model, alone.
    label_smoothing: float = 0.0
    ema: float = 0.0  # Decay of the moving average that becomes the result; 0 for none.
    accumulate: int = 1  # Parts that a step takes its batch in.
    mixup: float = 0.0  # Alpha of mixup and cutmix; 0 for none.
    cutmix: float = 0.0
    distill: float = 0.0  # The teacher's share of the loss; 0 without one.
    temperature: float = 1.0  # Of what it says and the model says, where they are compared.
    seed: int = 0  # Of what is mixed, and how.

    def init(self, parameters: Tree) -> TrainState:
        """Make the state before the first step."""
        parameters = jax.tree.map(jnp.asarray, parameters)
        trained, _ = self._split(parameters)
        # A copy, since the step is given the parameters' own memory to write into.
        average = jax.tree.map(jnp.copy, trained) if self.ema else None
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, parameters, self.optimizer.init(trained), average, no_sums())

    def teacher(self, parameters: Tree) -> Tree | None:
        """Copy those of the first parameters that steps will change, for the model that teaches."""
        return jax.tree.map(jnp.copy, self._split(parameters)[0]) if self.distill else None

    def result(self, state: TrainState) -> Tree:
        """Give the parameters that the run stands for: the averaged ones, where there are any."""
        return {**state.parameters, **(state.average or {})}

    def model(self, parameters: Tree) -> ViT:
        """Make the model around parameters."""
        return build_model(self.sizes, self.reducer, parameters, self.compute)

    def _model_of_shards(self, parameters: Tree, reducer: Reducer) -> ViT:
        """Make a model around one device's parameters, gathering those that are sharded."""
        gather_weights = None
        if self.placement.shard:
            sharding = self.placement.sharding
            shapes = abstract_parameters(self.sizes)
            specs = jax.tree.map(lambda leaf: sharding(leaf.shape).spec, shapes)
            gather_weights = gather_block(specs["blocks"])
            parameters = gather_parameters(parameters, specs)
        return build_model(
            self.sizes, reducer, parameters, self.compute, gather_weights=gather_weights
        )

    def normalize(self, pixels: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Make the model's input of pictures that have been resized."""
        return normalize(pixels, self.preprocessing.mean, self.preprocessing.std)

    def _loss(
        self,
        parameters: Tree,
        teacher: Tree | None,
        pixels: UInt8[Array, "B H W 3"],
        targets: Num[Array, "B ..."],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the loss of a batch; then the same and the accuracy by name."""
        images = self.normalize(pixels)
        logits = self._model_of_shards(parameters, self.reducer)(images)
        if self.sizes.decoder is not None:
            loss, right = map_loss(logits, targets, self.label_smoothing)
        else:
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            right = (logits.argmax(-1) == targets.argmax(-1)).mean()
        if teacher is not None:
            taught = self._model_of_shards(teacher, Reducer())(images)
            divergence = distillation_loss(logits, taught, self.temperature)
            if self.sizes.decoder is not None:
                divergence = (pixel_shares(targets, logits.shape[-1]) * divergence).sum((1, 2))
            loss = (1 - self.distill) * loss + self.distill * divergence.mean()
        return loss, {"loss": loss, "accuracy": right}

    def _targets(
        self, pixels: UInt8[Array, "B H W 3"], labels: Int[Array, "B ..."], step: Int[Array, ""]
    ) -> tuple[UInt8[Array, "B H W 3"], Num[Array, "B ..."]]:
        """Give what the model shall say of pictures: shares of classes; of maps, the labels."""
        if self.sizes.decoder is not None:
            return pixels, labels
        classes = jax.nn.one_hot(labels, self.sizes.num_classes)
        targets = optax.smooth_labels(classes, self.label_smoothing)
        # Before devices share the batch, so that their number does not matter.
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        return mix(pixels, targets, key, mixup=self.mixup, cutmix=self.cutmix)

    def step(
        self,
        state: TrainState,
        pixels: UInt8[Array, "B H W 3"],
        labels: Int[Array, "B ..."],
        teacher: Tree | None = None,
    ) -> TrainState:
        """Take one step; to be compiled with the state donated.

        Args:
            state: before the step.
            pixels: the pictures.
            labels: the class of each, or of each of its pixels: (B, H, W).
            teacher: what `Trainer.teacher` gave.
        """
        pixels, targets = self._targets(pixels, labels, state.step)
        trained, frozen = self._split(state.parameters)
        gradients = on_all_devices(self.gradients, self.placement, trained, frozen, teacher)
        grads, metrics = gradients(trained, frozen, pixels, targets, teacher)
        grads = self._without_key_bias(grads)
        updates, optimizer = self.optimizer.update(grads, state.optimizer, trained)
        trained = jax.tree.map(jnp.add, trained, updates)
        average = update_average(state.average, trained, state.step, self.ema)
        sums = jax.tree.map(jnp.add, state.sums, {**metrics, "steps": jnp.ones(())})
        return TrainState(state.step + 1, {**frozen, **trained}, optimizer, average, sums)

    def gradients(
        self,
        trained: Tree,
        frozen: Tree,
        pixels: UInt8[Array, "B H W 3"],
        targets: Num[Array, "B ..."],
        teacher: Tree | None = None,
    ) -> tuple[Tree, Metrics]:
        """Compute a batch's metrics, and the gradient of what is trained: none runs below it."""
        teacher = None if teacher is None else {**frozen, **teacher}

        def of(pixels, targets):
            def loss(trained):
                return self._loss({**frozen, **trained}, teacher, pixels, targets)

            return jax.grad(loss, has_aux=True)(trained)

        count = self.accumulate
        if count == 1:
            return of(pixels, targets)
        parts = _interleave(pixels, count), _interleave(targets, count)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of, *(part[0] for part in parts)))
        total, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, of(*part)), None), zeros, parts
        )
        return jax.tree.map(lambda sums: sums / count, total)

    def _without_key_bias(self, gradients: Tree) -> Tree:
        """Keep the biases of keys at 0 in a model that has none, whose place is in `in_proj`."""
        if self.sizes.qkv_bias != "qv" or self.head_only:
            return gradients
        in_proj = gradients["blocks"]["in_proj"]
        has = jnp.repeat(jnp.array([1.0, 0.0, 1.0]), self.sizes.width)
        in_proj = {**in_proj, "bias": in_proj["bias"] * has[None]}
        return {**gradients, "blocks": {**gradients["blocks"], "in_proj": in_proj}}

    def _split(self, parameters: Tree) -> tuple[Tree, Tree]:
        """Separate what is trained from what is not."""
        names = (*HEADS, "decoder") if self.head_only else tuple(parameters)
        trained = {name: parameters[name] for name in parameters if name in names}
        return trained, {name: parameters[name] for name in parameters if name not in names}


def map_loss(
    logits: Float[Array, "B H W n"], labels: Int[Array, "B H W"], smoothing: float = 0.0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the cross entropy of maps, and the share of right pixels.

    Args:
        logits: of every pixel.
        labels: its class; 255 for pixels that do not count.
        smoothing: share of the target that is spread over all classes.
    """
    share = pixel_shares(labels, logits.shape[-1])
    logs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(logs, jnp.where(share > 0, labels, 0)[..., None], axis=-1)[..., 0]
    loss = -(share * ((1 - smoothing) * own + smoothing * logs.mean(-1))).sum((1, 2)).mean()
    return loss, (share * (logits.argmax(-1) == labels)).sum((1, 2)).mean()


def pixel_shares(labels: Int[Array, "B H W"], classes: int) -> Float[Array, "B H W"]:
    """Say how much each pixel counts in its picture's loss: as much as the others with a class.

    Each picture counts alike, however many of its pixels are labelled: so the mean over a batch is
    that over its parts.
    """
    known = (labels >= 0) & (labels < classes) & (labels != IGNORED)
    return known / jnp.maximum(known.sum((1, 2), keepdims=True), 1)


def distillation_loss(
    logits: Float[Array, "*rows n"], taught: Float[Array, "*rows n"], temperature: float
) -> Float[Array, "*rows"]:
    """Compare what a model says with what its teacher says (Hinton et al. 2015, arXiv 1503.02531).

    Returns:
        The Kullback-Leibler divergence of the teacher's softmax from the model's, both at a
        temperature, times its square: so gradients are as large as without.
    """
    teacher = jax.nn.log_softmax(taught / temperature)
    model = jax.nn.log_softmax(logits / temperature)
    return temperature**2 * (jnp.exp(teacher) * (teacher - model)).sum(-1)


def _interleave(batch: Array, parts: int) -> Array:
    """Cut (B, ...) into (parts, B / parts, ...), every `parts`-th row each.

    Unlike parts in a row, these need no exchange of rows where devices hold a share of B each.
    """
    return batch.reshape(-1, parts, *batch.shape[1:]).swapaxes(0, 1)


def update_average(
    average: Tree | None, parameters: Tree, step: Int[Array, ""], decay: float
) -> Tree | None:
    """Move an exponential average (Polyak and Juditsky 1992) towards the parameters after a step.

    The decay is at most `(1 + step) / (10 + step)`: early on, when parameters still change much,
    the average looks back over few steps only.
    """
    if average is None:
        return None
    rest = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: new + rest * (old - new), average, parameters)


def no_sums() -> Metrics:
    """Begin the sums of the next row of metrics.csv."""
    return {name: jnp.zeros(()) for name in ("loss", "accuracy", "steps")}


def make_optimizer(
    learning_rate: float,
    *,
    steps: int,
    warmup: int,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Build AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Args:
        learning_rate: the highest rate. It rises from 0 and falls back to 0 as a cosine.
        steps: steps in all.
        warmup: those in which it rises.
        weight_decay: of weight matrices only, not of biases, norms and embeddings.
        layer_decay: the rate of a layer, relative to the one above it.
    """
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, warmup + 1))
    is_matrix = functools.partial(
        jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel"
    )
    adamw = optax.adamw(rate, weight_decay=weight_decay, mask=is_matrix)
    parts = [optax.clip_by_global_norm(1.0), adamw]
    if layer_decay != 1:
        parts.append(optax.stateless(lambda updates, _: _scale_by_layer(updates, layer_decay)))
    return optax.chain(*parts)


def _scale_by_layer(updates: Any, decay: float) -> Any:
    """Shrink updates towards the input, as fine-tuning in BEiT does (arXiv 2106.08254).

    What follows the blocks keeps its update; block `i` of `depth` is scaled by
    `decay ** (depth - i)`, the embeddings by `decay ** (depth + 1)`.
    """
    depth = len(jax.tree.leaves(updates["blocks"])[0])

    def scale(path, leaf):
        name = path[0].key
        if name == "blocks":
            below_head = jnp.arange(depth, 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))
            return leaf * decay**below_head
        return leaf * decay ** (depth + 1) if name in _BEFORE_BLOCKS else leaf

    return jax.tree_util.tree_map_with_path(scale, updates)
