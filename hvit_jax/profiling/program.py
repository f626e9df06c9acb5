"""A compiled model for one batch size, and what its compiler says about it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvit_jax.models.vit import ViT
from hvit_jax.profiling.timing import Work, device_work


class Program:
    """The forward pass of a model, compiled ahead of time for one batch of random images.

    Attributes:
        images: the batch, (B, H, W, 3) in float32.
        compile_seconds: what tracing and compiling took.
        from_cache: whether the compiled program came from the disk instead.
        memory_bytes: device memory that the program needs at its peak, as the compiler planned it:
            weights, images, results and what lies between.
        compiler_flops: operations by the compiler's own count, in which a loop's body counts once
            and a library's call, such as cuDNN's, not at all; None where it does not tell.
    """

    def __init__(self, model: ViT, batch: int, *, seed: int):
        """Compile a model.

        Args:
            model: the model.
            batch: images at once.
            seed: of the images.
        """
        shape = (batch, *model.config.image_shape, 3)
        self.images = jax.random.normal(jax.random.key(seed), shape, jnp.float32)
        graph, self._state = nnx.split(model)
        forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
        with _cache_hits() as hits:
            started = time.perf_counter()
            self._compiled = forward.lower(self._state, self.images).compile()
            self.compile_seconds = time.perf_counter() - started
        self.from_cache = bool(hits)
        memory: Any = self._compiled.memory_analysis()
        self.memory_bytes: int | None = memory and (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        costs: Any = self._compiled.cost_analysis()
        self.compiler_flops: float | None = costs.get("flops") if costs else None

    def __call__(self) -> Float[Array, "B classes"]:
        """Start the forward pass."""
        return self._compiled(self._state, self.images)

    @property
    def work(self) -> Work:
        """The forward pass, to be timed."""
        return device_work(self)


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)
