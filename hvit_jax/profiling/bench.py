"""Models compiled and timed, each beside the dense one and, if wanted, a rival's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hvit_jax.checkpoint import fitted_parameters
from hvit_jax.config import ViTConfig
from hvit_jax.data.preprocess import normalize
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.parameters import Tree, build_model, count_parameters, init_parameters
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.ops.platform import compiler_options
from hvit_jax.profiling.cases import Case
from hvit_jax.profiling.config import ProfileConfig
from hvit_jax.profiling.device import (
    Latest,
    device_work,
    matmul_peak,
    program_memory,
    rates_and_ratios,
    time_alone,
    time_in_turns,
)
from hvit_jax.profiling.onnx_vit import check_onnx, onnx_rivals
from hvit_jax.profiling.results import Measurement
from hvit_jax.profiling.rivals import Rival, fastest_rival
from hvit_jax.profiling.timm_vit import check_timm, timm_model
from hvit_jax.profiling.torch_vit import check_torch, torch_model, torch_rivals


@dataclass(frozen=True)
class Against:
    """What --against names.

    Attributes:
        check: refuses models that the rival does not have.
        ways: makes the ways to run one, of its sizes, weights, batch and type.
        packages: whose versions are told.
    """

    check: Callable[[ViTConfig], None]
    ways: Callable[[ViTConfig, Tree, Program, str], Iterator[Rival]]
    packages: tuple[str, ...]


RIVALS = {
    "torch": Against(
        check_torch,
        lambda sizes, weights, batch, dtype: torch_rivals(
            torch_model(sizes, weights), "PyTorch", batch.images, dtype
        ),
        ("torch",),
    ),
    "timm": Against(
        check_timm,
        lambda sizes, weights, batch, dtype: torch_rivals(
            timm_model(sizes, weights), "timm", batch.images, dtype
        ),
        ("timm", "torch"),
    ),
    "onnxruntime": Against(
        check_onnx,
        lambda sizes, weights, batch, dtype: onnx_rivals(sizes, weights, batch.pixels),
        ("onnxruntime",),
    ),
}
# Of images, and of weights where no checkpoint brings them.
SEED = 0


class Program:
    """The forward pass of a model, compiled ahead of time for one batch of random images.

    Attributes:
        pixels: the batch, (B, H, W, 3) in bytes.
        images: the same normalised, in float32.
        work: the forward pass, to be timed.
        figures: what the compiler says, by the names of `Measurement`.
    """

    def __init__(self, model: ViT, batch: int):
        shape = (batch, *model.config.image_shape, 3)
        self.pixels = jax.random.randint(jax.random.key(SEED), shape, 0, 256).astype(jnp.uint8)
        self.images = normalize(self.pixels)
        with_weights, self._weights = part_weights(model)
        forward = jax.jit(
            lambda weights, images: with_weights(weights)(images),
            compiler_options=compiler_options(),
        )
        with _cache_hits() as hits:
            started = time.perf_counter()
            self._compiled = forward.lower(self._weights, self.images).compile()
            seconds = time.perf_counter() - started
        costs: Any = self._compiled.cost_analysis() or {}
        self.work = device_work(self)
        self.figures: dict[str, Any] = {
            "compile_seconds": seconds,
            "compile_from_cache": bool(hits),
            "compiler_gflops": costs["flops"] / 1e9 if "flops" in costs else None,
            "peak_memory_bytes": program_memory(self._compiled),
        }

    def __call__(self) -> Float[Array, "B classes"]:
        """Start the forward pass."""
        return self._compiled(self._weights, self.images)


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


class Profiler:
    """Measures cases. Those of one size share weights, the dense model and the rival.

    Attributes:
        problems: what went wrong beside the last case without stopping it.
    """

    def __init__(self, config: ProfileConfig, *, peak: float | None = None):
        """Make nothing yet; `peak` is that of the device, by default measured."""
        self.config, self._peak, self.problems = config, peak, []
        self._weights = Latest(self._read_or_draw)
        self._dense = Latest(lambda sizes, batch: self._compile(sizes, Reducer(), batch))
        self._rival = Latest(self._find_rival)

    @functools.cached_property
    def peak(self) -> float:
        """Operations per second of the device's fastest large matrix product."""
        config = self.config
        return self._peak or matmul_peak(config.compute.dtype, seconds=config.seconds)

    def measure(self, case: Case) -> Measurement:
        """Measure one case.

        Raises:
            FloatingPointError: if logits are not finite.
            RuntimeError: if the device runs out of memory.
        """
        config, sizes, batch, self.problems = self.config, case.config, case.batch, []
        row, dense = case.row(config.compute.dtype), case.reducer.name == "dense"
        program = self._dense(sizes, batch) if dense else self._compile(sizes, case.reducer, batch)
        rival = self._rival(sizes, batch) if config.against else None
        others = {"dense": self._dense(sizes, batch).work} if config.dense and not dense else {}
        others |= {"rival": rival.work} if rival else {}
        times = time_in_turns([program.work, *others.values()], seconds=config.seconds)
        rates, ratios = rates_and_ratios(times, batch)
        speedups = dict(zip(others, map(statistics.median, ratios), strict=True))
        throughput = statistics.median(rates)
        operations = 2e9 * row.gflops * throughput
        if config.trace is not None and case.reducer.name == (config.reducer or Reducer()).name:
            with jax.profiler.trace(str(config.trace)):
                program.work.seconds(3)
        return dataclasses.replace(
            row,
            **program.figures,
            **(self._latency(case, program, rival) if config.latency else {}),
            parameters=count_parameters(self._weights(sizes)),
            throughput=throughput,
            throughput_range=[min(rates), max(rates)],
            tflops_per_second=operations / 1e12,
            peak_share=operations / self.peak,
            speedup_over_dense=1.0 if dense else speedups.get("dense"),
            speedup_over_rival=speedups.get("rival"),
            rival=rival and rival.name,
        )

    def _compile(self, sizes: ViTConfig, reducer: Reducer, batch: int) -> Program:
        program = self._program(sizes, reducer, batch)
        if not np.isfinite(np.asarray(program(), np.float32)).all():
            raise FloatingPointError("the logits are not finite numbers")
        return program

    def _program(self, sizes: ViTConfig, reducer: Reducer, batch: int) -> Program:
        weights, compute = self._weights(sizes), self.config.compute
        return Program(build_model(sizes, reducer, weights, compute), batch)

    def _read_or_draw(self, sizes: ViTConfig) -> Tree:
        if self.config.checkpoint is None:
            return init_parameters(sizes, SEED)
        return fitted_parameters(self.config.checkpoint, sizes)

    def _find_rival(self, sizes: ViTConfig, batch: int) -> Rival:
        dense, dtype = self._dense(sizes, batch), self.config.compute.dtype
        rivals = RIVALS[str(self.config.against)].ways(sizes, self._weights(sizes), dense, dtype)
        options = {"seconds": self.config.seconds, "latency": self.config.latency}
        best, self.problems = fastest_rival(rivals, dense(), dtype, **options)
        return best

    def _latency(self, case: Case, program: Program, rival: Rival | None) -> dict[str, Any]:
        if case.batch > 1:
            program = self._program(case.config, case.reducer, 1)
        times = time_alone(program.work, seconds=self.config.seconds)
        theirs = time_alone(rival.single, seconds=self.config.seconds) if rival else None
        return {
            "latency_ms": 1e3 * statistics.median(times),
            "latency_p95_ms": 1e3 * float(np.quantile(times, 0.95, method="higher")),
            "rival_latency_ms": theirs and 1e3 * statistics.median(theirs),
        }
