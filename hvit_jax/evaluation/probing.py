"""A probe's training: features of the training pictures, and the head that is made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from hvit_jax.distributed.gathering import gather, share
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.evaluation.heads import TEMPERATURE, Head, Neighbours
from hvit_jax.evaluation.inputs import Inputs
from hvit_jax.evaluation.logistic import MOST_STEPS, fit_logistic
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import compile_features
from hvit_jax.evaluation.tally import Tally, join_rows
from hvit_jax.models.vit import ViT
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.progress import show_progress


@dataclass(frozen=True)
class Training:
    """How a probe's training pictures are seen.

    Attributes:
        inputs: with training pictures.
        model: makes their features; it has no head.
        placement: the devices that share a batch.
        batch_size: pictures at once, of all devices together.
        workers: processes that decode.
        skip_unreadable: leave out pictures that cannot be read, instead of raising.
        messages: where progress goes.
        on_step: called after each batch, and after each step of a fit.
    """

    inputs: Inputs
    model: ViT
    placement: Placement
    batch_size: int
    workers: int
    messages: Console
    skip_unreadable: bool = False
    on_step: Callable[[], None] = lambda: None

    def learn(self, tally: Tally) -> tuple[Head, dict[str, Any]]:
        """Train the probe.

        Args:
            tally: keeps the features in the logits' place, and may have some of an earlier run.

        Returns:
            The head, on every device, and how it came about, as results tell it.

        Raises:
            InputError: if memory runs out, or features are not finite numbers or too few for the
                probe; `PictureError` for a picture that cannot be read.
        """
        self._see(tally)
        features, labels = self._seen(tally)
        size = (
            f"the features of {len(labels)} training pictures take {features.nbytes / 1e9:.1f} GB"
        )
        with explain_out_of_memory(self.batch_size, f"{size}; give fewer"):
            head, about = self._fit(features, labels)
            arrays, structure = jax.tree.flatten(head)
            head = structure.unflatten(self.placement.replicate(arrays))
        return head, {**about, "images": len(labels), "skipped": tally.skipped}

    def _see(self, tally: Tally) -> None:
        """Compute the features of the training pictures that the tally does not have yet."""
        inputs, source, placement = self.inputs, self.inputs.training, self.placement
        assert source is not None  # Otherwise nobody asks for a probe.
        size = placement.round_up(min(self.batch_size, len(source)))
        sharding = BatchSharding(len(source), size, first=gather(tally.totals.pictures)[0])
        if not sharding.batches:
            return
        labels = np.array(source.labels, np.int32)[list(sharding.indices)]
        shape, preprocessing = inputs.sizes.image_shape, inputs.preprocessing
        self.messages.print(f"features of {len(source)} training pictures")
        with (
            sharding.load(source, shape, self.workers, preprocessing) as batches,
            explain_out_of_memory(size, smaller_batch(size, placement.devices)),
            show_progress(
                self.messages, len(source), tally.totals.pictures, unit="training pictures"
            ) as show,
        ):

            def on_batch(tally: Tally) -> None:
                speed = tally.totals.images_per_second or 0.0
                show(tally.totals.pictures, f"{speed:.1f} images/s")
                self.on_step()

            step = compile_features(self.model, size, placement, preprocessing)
            put, skip = placement.shard_batch, self.skip_unreadable
            score(step, batches, labels, tally, put, skip_unreadable=skip, on_batch=on_batch)

    def _seen(self, tally: Tally) -> tuple[Float[np.ndarray, "N C"], Int[np.ndarray, " N"]]:
        """Give features and labels; only the first process has those of an earlier run."""
        rows = join_rows(tally.rows)
        features, labels = share(np.asarray(rows.logits)), share(rows.labels)
        if not len(labels):
            raise InputError("none of the training pictures could be read")
        if broken := int((~np.isfinite(features).all(1)).sum()):
            raise InputError(
                f"the features of {broken} training pictures are not finite numbers, so that no "
                "probe can be made of them"
            )
        return features, labels

    def _fit(
        self, features: Float[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]
    ) -> tuple[Head, dict[str, Any]]:
        """Make the head, and say how."""
        asked, classes = self.inputs.classifying, len(self.inputs.labelled.names)
        if asked.probe == "knn":
            if asked.probe_k > len(labels):
                raise InputError(
                    f"--probe-k {asked.probe_k} is more than the {len(labels)} training pictures "
                    "that could be read"
                )
            head = Neighbours.of_training(features, labels, classes, asked.probe_k)
            return head, {"k": asked.probe_k, "temperature": TEMPERATURE}
        with show_progress(self.messages, MOST_STEPS, unit="steps at most") as show:

            def on_step(step: int, text: str) -> None:
                show(step, text)
                self.on_step()

            fit = fit_logistic(
                features,
                labels,
                classes,
                self.placement,
                weight_decay=asked.probe_weight_decay,
                on_step=on_step,
            )
        self.messages.print(
            f"logistic regression: weight decay {fit.weight_decay:g}, training loss {fit.loss:.4f} "
            f"after {fit.steps} steps"
        )
        about = {"weight_decay": fit.weight_decay, "training_loss": fit.loss, "steps": fit.steps}
        return fit.head, about
