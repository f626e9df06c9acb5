"""Measure everything that the performance page shows, on whatever device there is.

`python benchmarks/run_all.py` writes benchmarks/results/DEVICE.json and prints the table. On a GPU:
the published rows in bfloat16 at batch 32, all or, as `run_all.py vit_l16`, those of a model or
method; and the dense models at batch 1, unrolled. On a CPU: ViT-B/16 in float32 at 384 pixels, with
the settings that the original was measured with. Started again, it goes on.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hvit_jax.api import with_resolution
from hvit_jax.config import Compute, named_config
from hvit_jax.profiling import ProfileConfig
from hvit_jax.profiling.bench import Profiler
from hvit_jax.profiling.cases import Case, make_case, published_cases
from hvit_jax.profiling.device import use_compilation_cache
from hvit_jax.profiling.rows import Measurement, markdown_table
from hvit_jax.profiling.run import open_results, run_cases
from hvit_jax.reducers import make_reducer

RESULTS = Path(__file__).parent / "results"
CPU_METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dense", {}),
    ("hourglass", {"cluster_location": 3, "num_clusters": 144}),
    ("hourglass", {"cluster_location": 6, "num_clusters": 289}),
    ("evit", {"keep_rate": 0.7}),
    ("evit", {"keep_rate": 0.5}),
    ("tome", {"r": 16}),
    ("tome", {"r": 40}),
    ("evo", {"prune_location": 4, "prune_ratio": 0.5}),
    ("ats", {"blocks": (9, 10, 11), "max_tokens": 200}),
    ("act", {"q_hashes": 16, "max_clusters": 300}),
    ("smyrf", {"first_block": 6, "rounds": 32}),
)


def cpu_cases() -> list[Case]:
    """List ViT-B/16 dense at 224, then all methods at 384."""
    config = named_config("vit_b16")
    small = make_case(with_resolution(config, 224), make_reducer("dense"), batch=4)
    return [small, *(make_case(config, make_reducer(n, **a), batch=2) for n, a in CPU_METHODS)]


def single_cases(selection: str) -> list[Case]:
    """List each dense model at batch 1."""
    cases = published_cases(selection, batch=1)
    return [case for case in cases if case.reducer.name == "dense"]


def main(selection: str = "all") -> int:
    """Measure, write the results and print the table."""
    gpu = jax.default_backend() == "gpu"
    cases = published_cases(selection, batch=32) if gpu else cpu_cases()
    config = ProfileConfig(
        compute=Compute(dtype="bfloat16" if gpu else "float32"),
        seconds=0.3 if gpu else 1.5,
        latency=not gpu,
        against="torch",
        resume=True,
    )
    use_compilation_cache()
    rows = measure(cases, config, "")
    if gpu and single_cases(selection):
        # A scan copies each block's weights, which counts where a block takes little longer.
        unrolled = dataclasses.replace(config, compute=Compute(dtype="bfloat16", unroll=True))
        rows += measure(single_cases(selection), unrolled, "-batch-1")
    return int(any(row.error is not None for row in rows))


def measure(cases: list[Case], config: ProfileConfig, suffix: str) -> list[Measurement]:
    """Measure cases that are not in the file yet, and print its table."""
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = RESULTS / f"{device}{suffix}.json"
    results = open_results(dataclasses.replace(config, output=(path,)))
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    rows = run_cases(cases, Profiler(config), results, messages)
    print(markdown_table(rows))
    return rows


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
