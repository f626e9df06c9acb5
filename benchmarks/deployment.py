"""Time exported models in the runtimes of a CPU, beside XLA and PyTorch, all in one run.

`python benchmarks/deployment.py` needs the extras `openvino` and `convert`. It writes
benchmarks/results/deployment.json after every group of rows, and prints the docs' tables. First all
ways to run the dense model take turns; then, way by way, the methods take turns with the dense one.
Weights are random. Each way's logits are held against XLA's in float32 before it is timed.

With `--shared`, for a machine on which other programs run, each way gets one thread, and what is
counted is the processor's time.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnxruntime import quantization
from rich.console import Console

from hvit_jax import InputError, Reducer, make_reducer
from hvit_jax.api import with_resolution
from hvit_jax.architectures import named_config
from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.config import Compute, ViTConfig
from hvit_jax.costs import cost_share
from hvit_jax.exporting import ExportConfig
from hvit_jax.exporting.forward import forward, named_weights
from hvit_jax.exporting.onnx.file import MODEL, write_onnx
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.pictures import Preprocessing
from hvit_jax.profiling.device import describe_device
from hvit_jax.profiling.torch_vit import torch_model
from hvit_jax.system.files import check_destination, write_json
from hvit_jax.system.run import run

RESULTS = Path(__file__).parent / "results" / "deployment.json"
METHODS = {
    "hourglass": {"cluster_location": 3, "num_clusters": 144},
    "tome": {"r": 40},
    "evit": {"drop_locations": (3, 6, 9), "keep_rate": 0.5},
    "evo": {"prune_location": 4, "prune_ratio": 0.5},
}
# Root mean square of the differences to XLA's logits in float32, in their standard deviations.
# Tokens that are nearly alike are chosen otherwise in 16 and in 8 bits.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.3, "int8": 0.5}
RUNTIMES = ("ONNX Runtime", "OpenVINO")
Program = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Way:
    """A runtime and what it computes in."""

    runtime: str
    precision: str

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}"


DENSE_WAYS = (
    Way("PyTorch", "float32"),
    Way("PyTorch compiled", "float32"),
    Way("PyTorch", "bfloat16"),
    Way("PyTorch compiled", "bfloat16"),
    Way("XLA", "bfloat16"),
)
WAYS = (
    Way("XLA", "float32"),
    Way("ONNX Runtime", "float32"),
    Way("ONNX Runtime", "int8"),
    Way("OpenVINO", "float32"),
    Way("OpenVINO", "bfloat16"),
    Way("OpenVINO", "int8"),
)


class Models:
    """Makes programs of the methods, from the same random weights, in a folder of their files."""

    def __init__(self, config: ViTConfig, folder: Path, *, shared: bool):
        self.config, self.folder, self.shared = config, folder, shared
        self.clock = time.process_time if shared else time.perf_counter
        self.parameters = init_parameters(config, 0)

    def program(self, way: Way, reducer: Reducer) -> Program:
        """Make one way to run a method: pictures in bytes to logits."""
        if way.runtime == "XLA":
            return self._xla(reducer, way.precision)
        if way.runtime.startswith("PyTorch"):
            return self._torch(way)
        file = self._quantized(reducer) if way.precision == "int8" else self._file(reducer)
        if way.runtime == "ONNX Runtime":
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = int(self.shared)  # 0: as many as there are cores.
            session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
            return lambda pixels: session.run(None, {"pixels": pixels})[0]
        hint = {"bfloat16": "bf16"}.get(way.precision, "f32")
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        options |= {"INFERENCE_NUM_THREADS": 1} if self.shared else {}
        compiled = openvino.Core().compile_model(file, "CPU", options)
        return lambda pixels: np.array(compiled(pixels)[0])

    def _xla(self, reducer: Reducer, precision: str) -> Program:
        model = build_model(self.config, reducer, self.parameters, Compute(precision))
        weights = [jax.numpy.asarray(array) for array in named_weights(model).values()]
        compiled = jax.jit(forward(model, Preprocessing()))
        return lambda pixels: np.asarray(compiled(weights, pixels))

    def _torch(self, way: Way) -> Program:
        dtype = getattr(torch, way.precision)
        model = torch_model(self.config, self.parameters).to(dtype)
        if "compiled" in way.runtime:
            model = torch.compile(model)
        shift, scale = (torch.tensor(x) for x in (Preprocessing().mean, Preprocessing().std))

        def classify(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                images = (torch.from_numpy(pixels) / 255 - shift) / scale
                return model(images.permute(0, 3, 1, 2).to(dtype)).float().numpy()

        return classify

    def _file(self, reducer: Reducer) -> Path:
        folder = self.folder / reducer.name
        if not folder.exists():
            folder.mkdir()
            compute = Compute(attention="xla", unroll=True)
            model = build_model(self.config, reducer, self.parameters, compute)
            config = ExportConfig(output=folder, format="onnx")
            write_onnx(folder, model, named_weights(model), Preprocessing(), config, {})
        return folder / MODEL

    def _quantized(self, reducer: Reducer) -> Path:
        """Quantise products with weights by ONNX Runtime's own tool, which OpenVINO reads too."""
        file = self._file(reducer)
        quantized = file.with_name("int8.onnx")
        if not quantized.exists():
            graph = onnx.load(file, load_external_data=False).graph
            stored = {tensor.name for tensor in graph.initializer}
            products = [node for node in graph.node if node.op_type == "MatMul"]
            quantization.quantize_static(
                file,
                quantized,
                _Calibration(noise(self.config, 2)),
                op_types_to_quantize=["MatMul"],
                nodes_to_exclude=[node.name for node in products if node.input[1] not in stored],
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                activation_type=quantization.QuantType.QUInt8,
            )
        return quantized


class _Calibration(quantization.CalibrationDataReader):
    """Gives pictures one by one, to find out how large activations get."""

    def __init__(self, pixels: np.ndarray):
        self._rows = iter(pixels)

    def get_next(self) -> dict[str, np.ndarray] | None:
        row = next(self._rows, None)
        return None if row is None else {"pixels": row[None]}


def noise(config: ViTConfig, count: int) -> np.ndarray:
    """Make random pictures."""
    shape = (count, *config.image_shape, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def compare(
    models: Models,
    programs: dict[str, tuple[Way, Reducer, Program]],
    batch: int,
    expected: Callable[[Reducer, np.ndarray], np.ndarray],
    rounds: int,
) -> Iterator[dict[str, Any]]:
    """Check programs, and time them in turns: a row each."""
    pixels, rows = noise(models.config, batch), []
    for way, reducer, program in programs.values():
        started = models.clock()
        found = program(pixels)  # Compiles, where that waits for the first call.
        first, right = models.clock() - started, expected(reducer, pixels)
        error = float(np.sqrt(np.square(found - right).mean()) / right.std())
        if not error <= TOLERANCES[way.precision]:
            raise InputError(f"{way}, {reducer.name}: logits differ by {error:.2g} deviations")
        rows.append(
            {
                "runtime": way.runtime,
                "precision": way.precision,
                "method": reducer.name,
                "args": reducer.options(),
                "gflops_share": cost_share(models.config, reducer),
                "batch": batch,
                "first_call_seconds": first,
                "error": error,
                "seconds": [],
            }
        )
    for _ in range(rounds):
        for row, (_, _, program) in zip(rows, programs.values(), strict=True):
            time.sleep(0.05)  # Threads of the one before may still be waiting for work.
            started = models.clock()
            program(pixels)
            row["seconds"].append(models.clock() - started)
    for row in rows:
        yield {**row, "median": statistics.median(row["seconds"])}


def with_speeds(rows: list[dict[str, Any]], base: str, name: str) -> list[dict[str, Any]]:
    """Add how many times faster each row is than the one of some name: the median of rounds."""
    first = next(row["seconds"] for row in rows if base in (row["method"], row["runtime"]))
    for row in rows:
        rates = [theirs / own for theirs, own in zip(first, row["seconds"], strict=True)]
        row[name] = statistics.median(rates)
    return rows


def dense_table(rows: list[dict[str, Any]]) -> str:
    """Format the ways to run the dense model."""
    lines = ["| dense in | ms a picture | fastest to slowest | x PyTorch | error |"]
    lines.append("|---|---:|---:|---:|---:|")
    for row in rows:
        each = [1000 * value / row["batch"] for value in row["seconds"]]
        lines.append(
            f"| {row['runtime']} {row['precision']} | {statistics.median(each):.0f} | "
            f"{min(each):.0f}-{max(each):.0f} | {row['speed']:.2f} | {row['error']:.0e} |"
        )
    return "\n".join(lines)


def methods_table(rows: list[dict[str, Any]]) -> str:
    """Format the methods' speed over dense, and the share of what the GFLOPs promise."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))
    lines = [
        "| x dense (share) in | " + " | ".join(methods) + " |",
        "|---|" + "---:|" * len(methods),
    ]
    for way in dict.fromkeys((row["runtime"], row["precision"]) for row in rows):
        own = {r["method"]: r for r in rows if (r["runtime"], r["precision"]) == way}
        cells = [f"{own[m]['speed']:.2f} ({own[m]['share']:.2f})" for m in methods if m in own]
        lines.append(f"| {' '.join(way)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(models: Models, batch: int, rounds: int, note: Callable[[str], None]) -> Iterator[Any]:
    """Measure all at one batch size: lists of rows, the dense model's first."""
    dense, reducers = Reducer(), [make_reducer(name, **args) for name, args in METHODS.items()]
    reducers = [reducer.resolve(models.config) for reducer in reducers]
    right: dict[str, np.ndarray] = {}

    def expected(reducer: Reducer, pixels: np.ndarray) -> np.ndarray:
        if reducer.name not in right:
            right[reducer.name] = models.program(WAYS[0], reducer)(pixels)
        return right[reducer.name]

    def programs(pairs) -> dict[str, tuple[Way, Reducer, Program]]:
        made = {}
        for way, reducer in pairs:
            note(f"batch {batch}: {reducer.name} in {way}")
            made[f"{way} {reducer.name}"] = (way, reducer, models.program(way, reducer))
        return made

    ways = (*DENSE_WAYS, *WAYS)
    rows = compare(models, programs((w, dense) for w in ways), batch, expected, rounds)
    yield with_speeds(list(rows), "PyTorch", "speed")
    for way in WAYS:
        gc.collect()
        some = programs((way, reducer) for reducer in (dense, *reducers))
        rows = list(compare(models, some, batch, expected, rounds))
        for row in with_speeds(rows, "dense", "speed"):
            row["share"] = row["speed"] * row["gflops_share"]
        yield rows


def main() -> int:
    """Measure, write the results and print the tables; returns the exit status."""
    return run(_main, "deployment.py")


def _main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_b16", metavar="NAME")
    parser.add_argument("--resolution", type=int, default=384, metavar="N")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE.json")
    options = parser.parse_args()
    if options.output.suffix != ".json":
        raise InputError(f"--output takes a .json file, got {options.output}")
    check_destination(options.output, overwrite=True)
    if options.shared:  # XLA's threads are as many as the cores that it may use.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
    config = with_resolution(named_config(options.model), options.resolution)
    beside = ("onnx", "onnxruntime", "openvino", "torch")
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    about = {
        **describe_device(beside=beside),
        "clock": "one thread's processor time" if options.shared else "wall clock",
        "instructions": [name for name in wanted if name in flags],
        "model": dataclasses.asdict(config),
        "rows": [],
    }
    print(
        json.dumps({key: about[key] for key in ("processor", "cpus", "instructions", "versions")})
    )
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        models = Models(config, Path(folder), shared=options.shared)
        for batch in options.batches:
            rows: list[dict[str, Any]] = []
            for index, more in enumerate(measure(models, batch, options.rounds, console.print)):
                about["rows"] += more
                write_json(options.output, about)
                rows += more if index else []
                if not index:
                    print(f"\nbatch {batch}\n\n{dense_table(more)}\n")
            print(methods_table(rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
