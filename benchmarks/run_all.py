"""Measure everything that the performance page shows, on whatever device there is.

`python benchmarks/run_all.py` writes benchmarks/results/rows-DEVICE.json and prints the table. On a
GPU: the published rows in bfloat16 at batch 32, all or, as `run_all.py vit_l16`, those of a model
or method; and the dense models at batch 1, unrolled. On a CPU: ViT-B/16 in float32 at 384 pixels,
with the settings that the original was measured with. Started again on the same machine, it goes
on. `--output FILE.json` writes elsewhere; benchmarks/results/cpu.json is what the page shows.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hvit_jax.api import with_resolution
from hvit_jax.architectures import named_config
from hvit_jax.config import Compute
from hvit_jax.convert.reader import import_torch
from hvit_jax.profiling import ProfileConfig
from hvit_jax.profiling.bench import Profiler
from hvit_jax.profiling.cases import Case, make_case, published_cases
from hvit_jax.profiling.results import Measurement, markdown_table
from hvit_jax.profiling.run import open_results, run_cases
from hvit_jax.reducers import make_reducer
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.run import leave, run

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the results and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("selection", nargs="?", default="all", help="a model or method, on a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where the results go")
    given = parser.parse_args(arguments)
    import_torch()  # Its lack is found before anything is computed.
    gpu = jax.default_backend() == "gpu"
    cases = published_cases(given.selection, batch=32) if gpu else cpu_cases()
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    path = given.output or RESULTS / f"rows-{device}.json"
    config = ProfileConfig(
        compute=Compute(dtype="bfloat16" if gpu else "float32"),
        seconds=0.3 if gpu else 1.5,
        latency=not gpu,
        against="torch",
        output=(path,),
        resume=True,
    )
    use_compilation_cache()
    rows = measure(cases, config)
    if gpu and single_cases(given.selection):
        # A scan copies each block's weights, which counts where a block takes little longer.
        unrolled = Compute(dtype="bfloat16", unroll=True)
        path = path.with_stem(f"{path.stem}-batch-1")
        config = dataclasses.replace(config, compute=unrolled, output=(path,))
        rows += measure(single_cases(given.selection), config)
    return int(any(row.error is not None for row in rows))


def measure(cases: list[Case], config: ProfileConfig) -> list[Measurement]:
    """Measure cases that are not in the file yet, and print its table."""
    results = open_results(config)
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    rows = run_cases(cases, Profiler(config), results, messages)
    print(markdown_table(rows))
    return rows


if __name__ == "__main__":
    leave(run(main, "run_all.py"))
