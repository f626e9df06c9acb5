"""Measure on a GPU, in one call, what the performance page and decisions about the code rest on.

`python benchmarks/laboratory.py --seconds 420` writes benchmarks/results/DEVICE.json after every
row, the most important rows first: every method of ViT-L/16 and ViT-H/14 in bfloat16 at batch 32
beside the dense model, with its kernels, some of them in float8 too; single images; dense ViT-L/16
without each of `SWITCHES`; PyTorch's fastest dense models; ViT-L/16 with the methods that have no
published rows; a step's gradient and a golden configuration of every method.
`--programs FOLDER` keeps some compiled programs. `--small` runs a tiny model on any device.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import hvit_jax
from hvit_jax.architectures import model_name
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.convert import convert_file
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.models.reducer import Reducer
from hvit_jax.ops.platform import compiler_options
from hvit_jax.profiling.cases import make_case, published_cases
from hvit_jax.profiling.device import (
    Work,
    describe_device,
    device_work,
    matmul_peak,
    time_alone,
    time_in_turns,
)
from hvit_jax.reducers import REDUCERS, make_reducer, method_name

HERE = Path(__file__).parent
BATCH, SEED = 32, 0
# What a published row has to say to be measured: the strongest setting of each method, and more.
CHOSEN = {
    "vit_l16": (
        {"method": "dense"},
        {"method": "hourglass", "num_clusters": 256},
        {"method": "evit", "keep_rate": 0.5},
        {"method": "tome", "r": 40},
        {"method": "evo", "prune_location": 8, "prune_ratio": 0.4},
        {"method": "ats", "blocks": [16, 17, 18, 19, 20, 21, 22, 23]},
        {"method": "act", "q_hashes": 16},
        {"method": "smyrf", "q_cluster_size": 64},
        {"method": "tome", "r": 10},
    ),
    "vit_h14": (
        {"method": "dense"},
        {"method": "hourglass", "cluster_location": 8},
        {"method": "evit", "keep_rate": 0.5},
        {"method": "evo", "prune_ratio": 0.3},
        {"method": "ats"},
        {"method": "tome", "r": 40},
        {"method": "act", "q_hashes": 16},
        {"method": "smyrf", "q_cluster_size": 64},
    ),
}
# What ViT-L/16, dense if nothing else is said, is measured without or with, one thing at a time.
SWITCHES: dict[str, dict[str, Any]] = {
    "XLA's own products": {"options": {"xla_gpu_enable_triton_gemm": True}},
    "exact GELU": {"gelu": "exact"},
    "cuDNN's attention": {"attention": "cudnn"},
    "unrolled": {"unroll": True},
    # Its blocks are short, so that what the loop adds weighs more.
    "hourglass, unrolled": {"unroll": True, "method": "hourglass"},
    # cuBLAS rounds to float8 behind its own GELU only.
    "exact GELU, float8": {"dtype": "float8", "gelu": "exact"},
}
# What is measured in float8 too, beside the dense model in bfloat16.
FLOAT8 = {"vit_l16": ("dense", "hourglass", "evit"), "vit_h14": ("dense",)}
KINDS = {
    "product": r"nvjet|gemm|cutlass|cublas|splitK",
    "attention": r"flash|fmha|attention",
    "sort": r"sort",
    "copy": r"memcpy|memset|slice|pad|concatenate|gather|scatter|copy|transpose",
}
TINY = ViTConfig(64, patch_size=8, depth=2, width=32, heads=2, mlp_width=64, num_classes=5)


@dataclass(frozen=True, eq=False)
class Row:
    """A program to measure.

    Attributes:
        name: what it is.
        config: the model's sizes.
        reducer: the method.
        batch: images at once.
        compute: how it is computed.
        options: of XLA, beside the project's.
        gradient: whether a training step's gradient is computed, not the logits.
    """

    name: str
    config: ViTConfig
    reducer: Reducer
    batch: int
    compute: Compute
    options: dict[str, Any] = field(default_factory=dict)
    gradient: bool = False


def program_name(row: Row) -> str:
    """Name the file of a row's compiled program."""
    name = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")
    return f"{name}{'-unrolled' * row.compute.unroll}.txt.gz"


class Program:
    """A row, compiled."""

    def __init__(self, row: Row, parameters: Any):
        """Compile a row."""
        model = build_model(row.config, row.reducer, parameters, row.compute)
        with_weights, self.weights = part_weights(model)
        shape = (row.batch, *row.config.image_shape, 3)
        self.images = jax.random.normal(jax.random.key(SEED), shape, jnp.float32)

        def logits(weights, images):
            return with_weights(weights)(images)

        run = _gradient(logits) if row.gradient else logits
        options = {**(compiler_options() or {}), **row.options}
        started = time.perf_counter()
        lowered = jax.jit(run).lower(self.weights, self.images)
        self.trace_seconds = time.perf_counter() - started
        self.compiled = lowered.compile(compiler_options=options or None)
        self.seconds = time.perf_counter() - started
        self.work = device_work(lambda: self.compiled(self.weights, self.images))

    def __call__(self) -> Any:
        """Start the program."""
        return self.compiled(self.weights, self.images)


def _gradient(run: Callable[..., Any]) -> Callable[..., Any]:
    """Compute the norm of a loss's gradient, so that nothing of it can be left out."""

    def loss(weights, images):
        logits = run(weights, images)
        labels = jnp.arange(len(images)) % logits.shape[-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return lambda weights, images: optax.global_norm(jax.grad(loss)(weights, images))


def plan(small: bool) -> Iterator[list[Row]]:
    """List what to measure, in parts that are compiled together; each starts with its reference."""
    dtype = "float32" if small else "bfloat16"
    compute, single = Compute(dtype), Compute(dtype, unroll=True)
    models = {"tiny": TINY} if small else {name: _config(name) for name in CHOSEN}
    first = next(iter(models.values()))
    dense = make_reducer("dense")
    parts = [_methods(name, config, compute, small) for name, config in models.items()]
    switches = []
    for name, changes in SWITCHES.items():
        fields = {key: value for key, value in changes.items() if key not in ("options", "method")}
        if small:  # Neither XLA's options nor cuDNN are those of a GPU.
            fields.pop("attention", None)
        options = {} if small else changes.get("options", {})
        without, reducer = replace(compute, **fields), make_reducer(changes.get("method", "dense"))
        switches.append(Row(name, first, reducer, 2 if small else BATCH, without, options))
    singles = [
        Row(f"{name} dense, one image", config, dense, 1, each)
        for name, config in models.items()
        for each in (single, compute)
    ]
    yield parts[0] + switches + singles
    yield from parts[1:]
    if not small:
        yield _later_methods(compute)
    config = TINY if small else replace(ViTConfig.vit_b16(), resolution=224)
    yield [
        Row(f"gradient of {method}", config, make_reducer(method), 8, compute, gradient=True)
        for method in (("dense",) if small else REDUCERS)
    ]


def reference(row: Row, rows: Iterable[Row]) -> Row:
    """Find what a row of a part is held against: the part's first of that size and batch."""
    return next(each for each in rows if (each.config, each.batch) == (row.config, row.batch))


def choose(rows: Sequence[Row], pattern: str) -> list[Row]:
    """Keep the rows of a part in whose names a pattern is found, and what they are held against."""
    found = [row for row in rows if re.search(pattern, row.name)]
    beside = [reference(row, rows) for row in found if not row.gradient]
    return [row for row in rows if row in found or row in beside]


def _config(name: str) -> ViTConfig:
    return next(c.config for c in published_cases("dense", batch=1) if model_name(c.config) == name)


def _methods(name: str, config: ViTConfig, compute: Compute, small: bool) -> list[Row]:
    if small:
        reducers = [make_reducer("dense"), make_reducer("tome", r=4), make_reducer("evit")]
        rows = [Row(f"tiny {each.name}", config, each, 2, compute) for each in reducers]
        return [*rows, replace(rows[0], name="tiny dense, float8", compute=Compute("float8"))]
    cases = [c for c in published_cases("all", batch=BATCH) if model_name(c.config) == name]
    rows = []
    for wanted in CHOSEN[name]:
        case = next(c for c in cases if wanted.items() <= _about(c.reducer).items())
        label = f"{name} {method_name(case.reducer.name, case.reducer.options())}"
        rows.append(Row(label, case.config, case.reducer, BATCH, compute))
    eights = [
        replace(row, name=f"{row.name}, float8", compute=Compute("float8"))
        for row in rows
        if row.reducer.name in FLOAT8[name]
    ]
    return rows + eights


def _later_methods(compute: Compute) -> list[Row]:
    """List the methods without published rows, by default as strong as ToMe's middle row."""
    config = _config("vit_l16")
    published = {case.reducer.name for case in published_cases("all", batch=BATCH)}
    methods = ["dense", *(name for name in REDUCERS if name not in published)]
    return [Row(f"vit_l16 {name}", config, make_reducer(name), BATCH, compute) for name in methods]


def _about(reducer: Reducer) -> dict[str, Any]:
    return {"method": reducer.name, **reducer.options()}


class Laboratory:
    """Measures rows until the time is up, and writes what it has after each."""

    def __init__(self, seconds: float, output: Path, programs: Path | None, small: bool):
        """Describe the device; nothing is compiled yet."""
        self.end, self.output = time.monotonic() + seconds, output
        self.programs, self.small, self._parameters = programs, small, {}
        peak = matmul_peak("float32" if small else "bfloat16", seconds=0.3)
        self.results: dict[str, Any] = {
            **describe_device(),
            "what": __doc__.partition("\n")[0],
            "product_tflops": peak / 1e12,
            "rows": [],
        }

    @property
    def left(self) -> float:
        """Seconds until the time is up."""
        return self.end - time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, print what matters of it, and write all."""
        self.results["rows"].append(row)
        shown = {key: value for key, value in row.items() if key != "kernels"}
        print(f"{self.left:6.1f} s left", json.dumps(shown, default=str), flush=True)
        self.output.write_text(json.dumps(self.results, indent=1, default=str) + "\n")

    def measure(self, rows: Sequence[Row]) -> None:
        """Compile rows beside each other, then time one after the other."""
        for config in {row.config for row in rows}:
            self._parameters.setdefault(config, init_parameters(config, SEED))
        pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        waiting = {pool.submit(Program, row, self._parameters[row.config]): row for row in rows}
        # What compiles for too long leaves the others time to be measured.
        concurrent.futures.wait(waiting, timeout=max(0, self.left - 3 * len(rows)))
        pool.shutdown(wait=False, cancel_futures=True)
        ready: dict[Row, Program] = {}
        for future, row in waiting.items():
            if not future.done():
                self.add({"row": row.name, "error": "not compiled in time"})
            elif error := future.exception():
                self.add({"row": row.name, "error": repr(error)[:2000]})
            else:
                ready[row] = future.result()
        for row in rows:
            if row in ready and self.left > 3:
                with self._reporting(row.name):
                    self.add(self._time(row, ready, reference(row, rows)))

    @contextlib.contextmanager
    def _reporting(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # One row that fails leaves the others to be measured.
            self.add({"row": name, "error": repr(error)[:2000]})

    def _time(self, row: Row, ready: dict[Row, Program], dense: Row) -> dict[str, Any]:
        program, beside = ready[row], ready.get(dense)
        if row.gradient:
            return {"row": row.name, "norm": float(program()), "compile_s": program.seconds}
        works = [program.work] + ([beside.work] if beside and row != dense else [])
        own, *other = time_in_turns(works, seconds=0.02 if self.small else 0.12)
        logits = np.asarray(program(), np.float32)
        case, held_against = (
            make_case(each.config, each.reducer, each.batch) for each in (row, dense)
        )
        found = {
            "row": row.name,
            "unrolled": row.compute.unroll,
            "batch": row.batch,
            "gflops": case.gflops,
            "ms": 1e3 * statistics.median(own),
            "ms_range": [1e3 * min(own), 1e3 * max(own)],
            "compile_s": program.seconds,
            "trace_s": program.trace_seconds,
            "finite": bool(np.isfinite(logits).all()),
        }
        if beside:
            expected = np.asarray(beside(), np.float32)
            off = np.sqrt(np.square(logits - expected).mean()) / expected.std()
            found["off_dense"] = float(off)
        found["images_per_second"] = 1e3 * row.batch / found["ms"]
        found["tflops"] = 2e-3 * case.gflops * found["images_per_second"]
        if other:
            ratios = [theirs / ours for theirs, ours in zip(other[0], own, strict=True)]
            found["x_dense"] = statistics.median(ratios)
            found["share"] = found["x_dense"] * case.gflops / held_against.gflops
        if row.batch == 1:
            found["latency_ms"] = 1e3 * statistics.median(time_alone(program.work, seconds=0.2))
        found["kernels"] = kernels(program.work)
        self._keep(row, program)
        return found

    def _keep(self, row: Row, program: Program) -> None:
        wanted = row.reducer.name in ("dense", "tome", "smyrf") and row.batch > 1
        if self.programs is not None and wanted:
            path = self.programs / program_name(row)
            path.write_bytes(gzip.compress(program.compiled.as_text().encode()))

    def check_goldens(self) -> None:
        """Hold one golden configuration a method against its expected logits, in float32."""
        sys.path.insert(0, str(HERE.parent))
        from tests.golden import Goldens, method_args

        goldens = Goldens()
        first = {case["method"]: name for name, case in reversed([*goldens.configs.items()])}
        with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("highest"):
            checkpoint, heads = Path(folder, "golden"), goldens.size["num_heads"]
            convert_file(goldens.folder / "checkpoint.torch", checkpoint, heads=heads)
            for method, name in first.items():
                if self.left < 5 or method not in REDUCERS:
                    continue
                with self._reporting(f"golden {name}"):
                    args = method_args(goldens.configs[name]["args"])
                    model = hvit_jax.load(checkpoint, method, **args)
                    draws = goldens.draws(name, model.reducer.draws(model.config))
                    images, draws = jax.tree.map(jnp.asarray, (goldens.images(name), draws))
                    logits = hvit_jax.jit_model(model)(images, draws=draws)
                    off = np.abs(logits - goldens.models[f"{name}/logits"]).max()
                    self.add({"row": f"golden {name}", "largest_difference": float(off)})

    def against_pytorch(self, seconds: float) -> None:
        """Run PyTorch's dense models in a process of their own, which has the GPU to itself."""
        command = [sys.executable, str(HERE / "laboratory_torch.py"), str(seconds)]
        command += ["small"] * self.small
        with (
            self._reporting("PyTorch"),
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as process,
        ):
            # Compiling may go on for long behind the last row.
            timer = threading.Timer(seconds + 15, process.kill)
            timer.start()
            for line in process.stdout or ():
                if line.startswith("{"):
                    self.add(json.loads(line))
            timer.cancel()


def kernels(work: Work, passes: int = 2) -> dict[str, Any]:
    """Time a program's kernels by their kind, and list the longest: name, ms, launches a pass."""
    with tempfile.TemporaryDirectory() as folder:
        work.seconds(1)
        with jax.profiler.trace(folder):
            work.seconds(passes)
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        spent, launches, kinds = Counter(), Counter(), Counter()
        events = list(_gpu_events(data))
        for event in events:
            name = re.sub(r"([._]\d+)+$", "", event.name)
            spent[name] += event.duration_ns / 1e6 / passes
            launches[name] += 1
    for name, ms in spent.items():
        matching = (kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE))
        kinds[next(matching, "other")] += ms
    longest = [
        [name[:100], round(ms, 3), launches[name] // passes] for name, ms in spent.most_common(24)
    ]
    return {
        "ms": sum(spent.values()),
        "idle_ms": _idle_ms(events) / passes,
        "launches": sum(launches.values()) // passes,
        "kinds": dict(kinds),
        "longest": longest,
    }


def _idle_ms(events: Sequence[Any]) -> float:
    """Add up the gaps between kernels, of whichever stream, in which none runs."""
    idle, until = 0.0, None
    for start, length in sorted((event.start_ns, event.duration_ns) for event in events):
        idle += max(0.0, start - until) if until is not None else 0.0
        until = max(start + length, until or 0.0)
    return idle / 1e6


def _gpu_events(data: Any) -> Iterable[Any]:
    for plane in data.planes:
        if "GPU" in plane.name:
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from line.events


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=420.0, help="stop after this time")
    parser.add_argument("--output", type=Path, help="where the results go")
    parser.add_argument("--programs", type=Path, help="a folder for compiled programs")
    parser.add_argument("--small", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--rows", default="", help="only rows whose names match this, and dense")
    parser.add_argument("--torch", type=float, default=75.0, help="seconds for PyTorch; 0: none")
    given = parser.parse_args(arguments)
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    output = given.output or HERE / "results" / f"{device}.json"
    if given.programs is not None:
        given.programs.mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(given.seconds, output, given.programs, given.small)
    parts = [choose(rows, given.rows) for rows in plan(given.small)]
    for place, rows in enumerate(filter(None, parts)):
        if place == 1 and given.torch and laboratory.left > given.torch:
            laboratory.against_pytorch(given.torch)
        if laboratory.left > 10:
            laboratory.measure(rows)
    if not given.rows:
        laboratory.check_goldens()
    return int(any("error" in row for row in laboratory.results["rows"]))


if __name__ == "__main__":
    # PyTorch needs its part of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    status = main()
    sys.stdout.flush()
    # Threads that still compile would be waited for.
    os._exit(status)
