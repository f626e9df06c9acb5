"""Models compiled and timed, each beside the dense one and, if wanted, PyTorch's."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hvit_jax.checkpoint import fitted_parameters
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.models.parameters import Tree, build_model, count_parameters, init_parameters
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.profiling.cases import Case
from hvit_jax.profiling.config import ProfileConfig
from hvit_jax.profiling.device import (
    Work,
    device_work,
    matmul_peak,
    percentile,
    time_alone,
    time_in_turns,
)
from hvit_jax.profiling.rows import Measurement
from hvit_jax.profiling.torch_vit import Rival, TorchRivals

# Of images, and of weights where no checkpoint brings them.
SEED = 0
DENSE = Reducer.name
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Speed:
    """How fast a batch was, in turns with other works.

    Attributes:
        throughput: images per second, the median of the rounds.
        throughput_range: the slowest and the fastest round's.
        ratios: how many times faster it was than each other work, round by round.
    """

    throughput: float
    throughput_range: list[float]
    ratios: dict[str, list[float]]

    def over(self, other: str) -> float | None:
        """Give the median of the rounds' ratios; None for a work that was not timed."""
        return statistics.median(self.ratios[other]) if other in self.ratios else None


class Bench(Generic[Kind]):
    """Compiles models of the same weights, and times them.

    What several models need is made when it is first needed, and kept: weights, the dense model.

    Attributes:
        parameters: gives the weights of a model of some size; those of the last size are kept.
    """

    def __init__(
        self,
        compute: Compute,
        weights: Callable[[ViTConfig], Tree],
        *,
        seconds: float,
        timer: Callable[..., list[list[float]]] = time_in_turns,
    ):
        """Make nothing yet.

        Args:
            compute: how models are computed.
            weights: gives the weights of a model of some size.
            seconds: how long one round of timing takes, about.
            timer: times works in turns; see `time_in_turns`.
        """
        self.compute, self.seconds, self._timer = compute, seconds, timer
        self.parameters = functools.lru_cache(maxsize=1)(weights)
        self._dense: tuple[Any, Kind] | None = None

    def compile(self, model: ViT, batch: int) -> Kind:
        """Compile a model for batches of one size; benches differ in what they make of it."""
        raise NotImplementedError

    def program(self, config: ViTConfig, reducer: Reducer, batch: int) -> Kind:
        """Compile a method; the last dense model is kept, since every method is held against it."""
        if reducer.name != DENSE:
            return self.compile(self.model(config, reducer), batch)
        if self._dense is None or self._dense[0] != (config, batch):
            self._dense = None  # Frees the last one's memory first.
            self._dense = (config, batch), self.compile(self.model(config, reducer), batch)
        return self._dense[1]

    def model(self, config: ViTConfig, reducer: Reducer) -> ViT:
        """Build a model under a method."""
        return build_model(config, reducer, self.parameters(config), self.compute)

    def time(self, work: Work, others: Mapping[str, Work], *, batch: int) -> Speed:
        """Time a batch in turns with other works.

        Args:
            work: the batch.
            others: what it is compared with, by name.
            batch: how many images it has.
        """
        own, *rest = self._timer([work, *others.values()], seconds=self.seconds)
        rates = [batch / seconds for seconds in own]
        ratios = {
            name: [theirs / ours for theirs, ours in zip(times, own, strict=True)]
            for name, times in zip(others, rest, strict=True)
        }
        return Speed(statistics.median(rates), [min(rates), max(rates)], ratios)


class Program:
    """The forward pass of a model, compiled ahead of time for one batch of random images.

    Attributes:
        images: the batch, (B, H, W, 3) in float32.
        figures: what the compiler says, by the names of `Measurement`.
    """

    def __init__(self, model: ViT, batch: int):
        """Compile a model for batches of some size."""
        shape = (batch, *model.config.image_shape, 3)
        self.images = jax.random.normal(jax.random.key(SEED), shape, jnp.float32)
        graph, self._state = nnx.split(model)
        forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
        with _cache_hits() as hits:
            started = time.perf_counter()
            self._compiled = forward.lower(self._state, self.images).compile()
            seconds = time.perf_counter() - started
        memory: Any = self._compiled.memory_analysis()
        costs: Any = self._compiled.cost_analysis() or {}
        self.figures: dict[str, Any] = {
            "compile_seconds": seconds,
            "compile_from_cache": bool(hits),
            "compiler_gflops": costs["flops"] / 1e9 if "flops" in costs else None,
            # As the compiler planned it: weights, images, results and what lies between.
            "peak_memory_bytes": memory
            and memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes,
        }

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


class Profiler(Bench[Program]):
    """Measures cases.

    Attributes:
        problems: what went wrong beside the last case without stopping it.
    """

    def __init__(self, config: ProfileConfig, *, peak: float | None = None, **options: Any):
        """Make nothing yet.

        Args:
            config: how to measure.
            peak: operations per second that the device can reach; default: measured.
            **options: of `Bench`.
        """
        super().__init__(config.compute, self._read_or_draw, seconds=config.seconds, **options)
        self.config, self._peak, self.problems = config, peak, []
        self._rival: tuple[Any, Rival] | None = None

    @functools.cached_property
    def peak(self) -> float:
        """Operations per second of the device's fastest large matrix product."""
        return self._peak or matmul_peak(self.compute.dtype, seconds=self.seconds)

    def compile(self, model: ViT, batch: int) -> Program:
        """Compile a model, and try it.

        Raises:
            FloatingPointError: if its logits are not finite.
        """
        program = Program(model, batch)
        if not np.isfinite(np.asarray(program(), np.float32)).all():
            raise FloatingPointError("the logits are not finite numbers")
        return program

    def measure(self, case: Case) -> Measurement:
        """Measure one case.

        Raises:
            FloatingPointError: if logits are not finite.
            RuntimeError: if the device runs out of memory.
        """
        config, self.problems = self.config, []
        program = self.program(case.config, case.reducer, case.batch)
        others = {}
        if config.dense and case.reducer.name != DENSE:
            others["dense"] = self.program(case.config, Reducer(), case.batch).work
        rival = self._torch_rival(case) if config.against == "torch" else None
        if rival is not None:
            others["torch"] = rival.work
        speed = self.time(program.work, others, batch=case.batch)
        operations = 2e9 * case.gflops * speed.throughput
        row = replace(
            case.row(self.compute.dtype),
            **program.figures,
            parameters=count_parameters(self.parameters(case.config)),
            throughput=speed.throughput,
            throughput_range=speed.throughput_range,
            tflops_per_second=operations / 1e12,
            peak_share=operations / self.peak,
            speedup_over_dense=1.0 if case.reducer.name == DENSE else speed.over("dense"),
            speedup_over_torch=speed.over("torch"),
            torch=rival and rival.name,
        )
        if config.trace is not None and case.reducer.name == config.reducer.name:
            _trace(program, config.trace)
        return replace(row, **self._latency(case, program, rival)) if config.latency else row

    def _latency(self, case: Case, program: Program, rival: Rival | None) -> dict[str, Any]:
        if case.batch > 1:
            program = Program(self.model(case.config, case.reducer), 1)
        times = time_alone(program.work, seconds=self.seconds)
        theirs = time_alone(rival.single, seconds=self.seconds) if rival else None
        return {
            "latency_ms": 1e3 * statistics.median(times),
            "latency_p95_ms": 1e3 * percentile(times, 0.95),
            "torch_latency_ms": theirs and 1e3 * statistics.median(theirs),
        }

    def _torch_rival(self, case: Case) -> Rival:
        key = (case.config, case.batch)
        if self._rival is None or self._rival[0] != key:
            self._rival = None
            dense = self.program(case.config, Reducer(), case.batch)
            parameters = self.parameters(case.config)
            rivals = TorchRivals(case.config, parameters, dense.images, self.compute.dtype)
            try:
                best = rivals.best(dense(), seconds=self.seconds, latency=self.config.latency)
            finally:
                self.problems += rivals.problems
            self._rival = key, best
        return self._rival[1]

    def _read_or_draw(self, config: ViTConfig) -> Tree:
        if self.config.checkpoint is None:
            return init_parameters(config, SEED)
        return fitted_parameters(self.config.checkpoint, config)


def _trace(program: Program, folder: Path) -> None:
    """Record three forward passes for TensorBoard or Perfetto."""
    program.work.seconds(1)
    with jax.profiler.trace(str(folder)):
        program.work.seconds(3)
