"""Measure cases, each beside the dense model and, if wanted, PyTorch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hvit_jax.checkpoint import fitted_parameters
from hvit_jax.config import ViTConfig
from hvit_jax.models.parameters import Tree, build_model, count_parameters, init_parameters
from hvit_jax.profiling.cases import Case
from hvit_jax.profiling.device import matmul_peak
from hvit_jax.profiling.program import Program
from hvit_jax.profiling.timing import median_ratio, percentile, time_alone, time_in_turns
from hvit_jax.profiling.torch_vit import Rival, TorchRivals


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Attributes:
        dtype: "float32" or "bfloat16".
        attention: "auto", "cudnn" or "xla".
        unroll: whether to compile every block on its own.
        checkpoint: where the weights come from; None for random ones.
        seconds: how long one round of timing takes, about.
        latency: whether to time single images.
        dense: whether to time the dense model beside each method.
        torch: whether to time PyTorch beside them.
        trace: a folder for a trace of some forward passes, or None.
    """

    dtype: str
    attention: str
    unroll: bool
    checkpoint: str | None
    seconds: float
    latency: bool
    dense: bool
    torch: bool
    trace: Path | None


# Of images, and of weights where no checkpoint brings them.
SEED = 0
# What a report has for a case that was not measured.
NOT_MEASURED = dict.fromkeys(
    (
        "parameters",
        "compiler_gflops",
        "compile_seconds",
        "compile_from_cache",
        "latency_ms",
        "latency_p95_ms",
        "throughput",
        "throughput_range",
        "peak_memory_bytes",
        "tflops_per_second",
        "peak_share",
        "speedup_over_dense",
        "speedup_over_torch",
        "torch",
        "torch_latency_ms",
        "error",
    )
)


class Bench:
    """Measures cases, and keeps what several of them need: weights, dense model, rival."""

    def __init__(self, settings: Settings):
        """Measure the device's matrix products; nothing else is made before it is needed."""
        self.settings = settings
        self.peak = matmul_peak(settings.dtype, seconds=settings.seconds)
        self.problems: list[str] = []
        self._weights: tuple[Any, Tree] | None = None
        self._dense: tuple[Any, Program] | None = None
        self._rival: tuple[Any, Rival] | None = None

    def measure(self, case: Case) -> dict[str, Any]:
        """Measure one case.

        Args:
            case: what.

        Returns:
            The figures of a report's row that were measured.

        Raises:
            jax.errors.JaxRuntimeError: if the device runs out of memory.
        """
        settings = self.settings
        program = self._program(case)
        works = {"case": program.work}
        if settings.dense and case.reducer.name != "dense":
            works["dense"] = self._dense_program(case).work
        rival = self._torch_rival(case) if settings.torch else None
        if rival is not None:
            works["torch"] = rival.work
        rounds = time_in_turns(list(works.values()), seconds=settings.seconds)
        times = dict(zip(works, rounds, strict=True))
        figures = {
            **self._about(case, program),
            **self._speed(case, times),
            "torch": rival and rival.name,
        }
        if settings.latency:
            figures |= self._latency(case, program, rival)
        if settings.trace is not None:
            _trace(program, settings.trace)
        return figures

    def _about(self, case: Case, program: Program) -> dict[str, Any]:
        flops = program.compiler_flops
        return {
            "parameters": count_parameters(self._parameters(case.config)),
            "compiler_gflops": flops and flops / 1e9,
            "compile_seconds": program.compile_seconds,
            "compile_from_cache": program.from_cache,
            "peak_memory_bytes": program.memory_bytes,
        }

    def _speed(self, case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
        rates = [case.batch / seconds for seconds in times["case"]]
        throughput = statistics.median(rates)
        operations = 2e9 * case.gflops * throughput
        compared = {name: median_ratio(each, times["case"]) for name, each in times.items()}
        dense = 1.0 if case.reducer.name == "dense" else compared.get("dense")
        return {
            "throughput": throughput,
            "throughput_range": [min(rates), max(rates)],
            "tflops_per_second": operations / 1e12,
            "peak_share": operations / self.peak,
            "speedup_over_dense": dense,
            "speedup_over_torch": compared.get("torch"),
        }

    def _latency(self, case: Case, program: Program, rival: Rival | None) -> dict[str, Any]:
        single = program if case.batch == 1 else Program(self._model(case), 1, seed=SEED)
        times = time_alone(single.work, seconds=self.settings.seconds)
        theirs = time_alone(rival.single, seconds=self.settings.seconds) if rival else None
        return {
            "latency_ms": 1e3 * statistics.median(times),
            "latency_p95_ms": 1e3 * percentile(times, 0.95),
            "torch_latency_ms": theirs and 1e3 * statistics.median(theirs),
        }

    def _program(self, case: Case) -> Program:
        program = Program(self._model(case), case.batch, seed=SEED)
        if not np.isfinite(np.asarray(program(), np.float32)).all():
            raise FloatingPointError("the logits are not finite numbers")
        return program

    def _model(self, case: Case):
        return build_model(
            case.config,
            case.reducer,
            self._parameters(case.config),
            dtype=jax.numpy.dtype(self.settings.dtype),
            param_dtype=jax.numpy.dtype(self.settings.dtype),
            attention=self.settings.attention,
            unroll=self.settings.unroll,
        )

    def _parameters(self, config: ViTConfig) -> Tree:
        if self._weights is None or self._weights[0] != config:
            self._weights = config, _read_or_draw(config, self.settings.checkpoint)
        return self._weights[1]

    def _dense_program(self, case: Case) -> Program:
        key = (case.config, case.batch)
        if self._dense is None or self._dense[0] != key:
            self._dense = None  # Frees the last one's memory first.
            self._dense = key, self._program(case.dense())
        return self._dense[1]

    def _torch_rival(self, case: Case) -> Rival:
        key = (case.config, case.batch)
        if self._rival is None or self._rival[0] != key:
            self._rival = None
            dense, dtype = self._dense_program(case), self.settings.dtype
            rivals = TorchRivals(case.config, self._parameters(case.config), dense.images, dtype)
            seconds, latency = self.settings.seconds, self.settings.latency
            self._rival = key, rivals.best(dense(), seconds=seconds, latency=latency)
            self.problems += rivals.problems
        return self._rival[1]


def _read_or_draw(config: ViTConfig, checkpoint: str | None) -> Tree:
    return (
        init_parameters(config, SEED)
        if checkpoint is None
        else fitted_parameters(checkpoint, config)
    )


def _trace(program: Program, folder: Path) -> None:
    """Record three forward passes for TensorBoard or Perfetto."""
    program.work.seconds(1)
    with jax.profiler.trace(str(folder)):
        program.work.seconds(3)
