"""What the browser demo computes: a picture under a method, beside the dense model."""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from hvit_jax.checkpoint import fitted_parameters, read_description, trained_with
from hvit_jax.costs import at_cost, cost_share
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.models.compiled import jit_model
from hvit_jax.models.parameters import build_model
from hvit_jax.profiling.device import device_work, time_in_turns
from hvit_jax.reducers import Reducer, method_name
from hvit_jax.visualization.draw import draw_groups, enlarged, heat_map, lay_over
from hvit_jax.visualization.maps import draw_maps
from hvit_jax.visualization.view import compile_views

KEPT_MODELS = 4  # Weights of a large model take gigabytes.
TOP, CLASSES_SHOWN = 3, 12


@dataclass(frozen=True)
class Answer:
    """What is shown of one picture."""

    groups: UInt8[np.ndarray, "h w 3"]
    attention: UInt8[np.ndarray, "h w 3"]
    reduced: dict[str, float]  # Probabilities of the likeliest classes under the method.
    dense: dict[str, float]  # The same of the dense model.
    summary: str  # Tokens, cost and speed beside the dense model's, as Markdown.
    # Of a model with a decoder: the dense map, the method's, and where they differ, with titles.
    maps: tuple[tuple[UInt8[np.ndarray, "h w 3"], str], ...] = ()


class Session:
    """A checkpoint, and its compiled models: a few are kept, the others made again."""

    def __init__(self, checkpoint: str | Path, resolution: int | tuple[int, int] | None = None):
        """Read what the checkpoint says of itself; see `hvit_jax.load`."""
        self.checkpoint = checkpoint
        self.description = read_description(checkpoint).at(resolution)
        self.config = self.description.config
        self._parameters = fitted_parameters(checkpoint, self.config)
        self._model = functools.lru_cache(KEPT_MODELS)(self._make)
        how = self.description.preprocessing
        self._views = functools.lru_cache(KEPT_MODELS)(
            lambda reducer, block: compile_views(self._model(reducer)[0], [block], how)
        )
        # One picture at a time, or models would be compiled twice and times would be wrong.
        self._lock = threading.Lock()

    @property
    def about(self) -> str:
        """Say which model this is and what it can recognise, as Markdown."""
        config, names = self.config, self.description.classes
        sizes = "{} x {} pixels, {} x {} patches".format(*config.image_shape, *config.grid)
        method = trained_with(self.description)
        trained = "" if method is None else f", trained with {method}"
        model = f"**Model:** `{self.checkpoint}`, {sizes}{trained}."
        if config.decoder is not None:
            return f"{model} It makes a map of every picture: {config.decoder.task}."
        if not config.num_classes:
            return (
                f"{model} It has no classification head, so it predicts nothing; how near its "
                "feature of a picture is to the dense model's stands in the table."
            )
        if not names:
            return f"{model} It knows {config.num_classes} classes, whose names are not stored."
        listed = ", ".join(names[:CLASSES_SHOWN])
        more = f" and {len(names) - CLASSES_SHOWN} more" if len(names) > CLASSES_SHOWN else ""
        return (
            f"{model} It knows {len(names)} classes: {listed}{more}. "
            "It names one of them for every picture, whatever the picture shows."
        )

    def answer(self, image: Image.Image, method: str, share: float, block: int) -> Answer:
        """Run a picture under a method and under the dense model, and time both.

        Args:
            image: a picture of any size.
            method: a name in `hvit_jax.REDUCERS`.
            share: of the dense model's GFLOPs that the method should cost, about.
            block: which block to look behind, counted from 0.
        """
        reducer = at_cost(method, self.config, share)
        with self._lock:
            return self._answer(image, reducer, block)

    def _answer(self, image: Image.Image, reducer: Reducer, block: int) -> Answer:
        how = self.description.preprocessing
        pixels = resize_and_crop(image, self.config.image_shape, how)[None]
        inputs = normalize(pixels, how.mean, how.std)
        (view,), output = self._views(reducer, block)(pixels)
        forward = self._model(reducer)[1]
        dense = self._model(Reducer().resolve(self.config))[1]
        works = [device_work(functools.partial(run, inputs)) for run in (dense, forward)]
        times = time_in_turns(works, seconds=0.1, rounds=5)
        shown = resize_and_crop(image, enlarged(self.config.image_shape), how)
        heat = heat_map(np.asarray(view.attention[0]), self.config.grid, shown.shape[:2])
        outputs = dense(inputs)[0], output[0]
        return Answer(
            groups=draw_groups(shown, np.asarray(view.groups[0]), self.config.grid),
            attention=lay_over(shown, heat),
            reduced=self._classes(outputs[1]),
            dense=self._classes(outputs[0]),
            summary=self._summary(reducer, block, int(view.tokens[0]), times, *outputs),
            maps=self._maps(shown, outputs, reducer.name),
        )

    def _make(self, reducer: Reducer):
        model = build_model(self.config, reducer, self._parameters)
        return model, jit_model(model)

    def _maps(self, shown, outputs, method: str):
        if self.config.decoder is None:
            return ()
        dense, reduced = map(np.asarray, outputs)
        columns = draw_maps([shown], [dense], [reduced], method)
        return tuple((drawing, title) for title, (drawing,) in columns)

    def _classes(self, logits: Float[jax.Array, ...]) -> dict[str, float]:
        """Name the likeliest classes; of a model without a head, none."""
        if not self.config.num_classes:
            return {}
        probabilities, best = jax.lax.top_k(jax.nn.softmax(logits), min(TOP, len(logits)))
        names = self.description.classes
        return {
            names[int(index)] if names else f"class {index}": float(probability)
            for probability, index in zip(probabilities, best, strict=True)
        }

    def _summary(
        self,
        reducer: Reducer,
        block: int,
        tokens: int,
        times: list[list[float]],
        *outputs: Float[jax.Array, ...],
    ) -> str:
        dense, reduced = (1e3 * float(np.median(each)) for each in times)
        likeness = ""
        if not self.config.num_classes and self.config.decoder is None:
            likeness = f"| cosine to the dense feature | 1.00 | {_cosine(*outputs):.3f} |\n"
        return (
            f"**Setting:** `{method_name(reducer.name, reducer.options())}`\n\n"
            f"| | dense | {reducer.name} |\n|---|---:|---:|\n"
            f"| tokens after block {block} | {self.config.num_tokens} | {tokens} |\n"
            f"| GFLOPs | 1.00 x | {cost_share(self.config, reducer):.2f} x |\n"
            f"| one picture | {dense:.1f} ms | {reduced:.1f} ms |\n"
            f"| speed | 1.00 x | {dense / reduced:.2f} x |\n{likeness}\n"
            f"One picture at a time on {jax.devices()[0].device_kind}; "
            "`hvit profile` times batches."
        )


def _cosine(a: Float[jax.Array, " C"], b: Float[jax.Array, " C"]) -> float:
    return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
