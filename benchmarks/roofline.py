"""Estimate on a machine without a GPU how fast an H100 runs the published rows.

XLA compiles the programs for an H100 as it would there (only cuBLAS's choice of kernels needs the
card), and `hlo_costs` adds up what their kernels cost. Figures are estimates, not measurements:
they show where the time goes, what a change gives and whether a method can reach its share.

`python benchmarks/roofline.py [METHOD|MODEL|all]` prints a table of the published rows in bfloat16
at batch 32; of all of them it writes benchmarks/results/roofline-h100.json. With `--operations
METHOD MODEL ROW` it prints the kernels of one, counted from 0. It needs `pip install "jax[cuda12]"`
and about a minute for a row of ToMe.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hlo_costs import Kernel, kernels, total
from jax.experimental import topologies

from hvit_jax.architectures import model_name
from hvit_jax.config import Compute
from hvit_jax.models.vit import ViT
from hvit_jax.ops.attention import cudnn
from hvit_jax.ops.platform import compiled_for, compiler_options
from hvit_jax.profiling.cases import Case, published_cases
from hvit_jax.reducers import method_name

BATCH = 32
RESULT = Path(__file__).parent / "results" / "roofline-h100.json"
KINDS = ("product", "attention", "other", "sort")


def compile_for_h100(case: Case, dtype: str = "bfloat16") -> Any:
    """Compile a case's model; nothing is run and no array is made."""

    def make():
        return ViT(case.config, case.reducer, rngs=nnx.Rngs(0), compute=Compute(dtype))

    target = (Path(__file__).parent / "h100.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graph, state = nnx.split(nnx.eval_shape(make))
    images = jax.ShapeDtypeStruct((case.batch, *case.config.image_shape, 3), jnp.float32)
    state, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, images)
    )
    checks = "jax._src.cudnn.fused_attention_stablehlo"
    with (
        mock.patch(f"{checks}.check_cudnn_version", lambda: 91000),
        mock.patch(f"{checks}.check_compute_capability", lambda wanted: True),
        mock.patch.object(cudnn, "obstacle", lambda dtype, size: None),
        compiled_for("gpu"),
    ):
        model = jax.jit(
            lambda state, images: nnx.merge(graph, state)(images),
            compiler_options=compiler_options(),
        )
        return model.lower(state, images).compile()


def estimate(case: Case) -> dict[str, Any]:
    """Estimate one row, without what needs the dense row."""
    start = time.perf_counter()
    compiled = compile_for_h100(case)
    seconds = time.perf_counter() - start
    listed = kernels(compiled.as_text())
    by_kind = collections.Counter()
    for kernel in listed:
        by_kind[kernel.kind] += 1e3 * kernel.times * kernel.seconds
    products = sum(kernel.times * kernel.flops for kernel in listed) / 2e9 / case.batch
    return {
        **_named(case),
        "multiply_adds_of_products": round(products, 1),
        "ms": round(1e3 * total(listed), 2),
        "ms_by_kind": {kind: round(by_kind[kind], 2) for kind in KINDS},
        "temporary_mib": compiled.memory_analysis().temp_size_in_bytes // 2**20,
        "compile_seconds_here": round(seconds, 1),
    }


def _named(case: Case) -> dict[str, Any]:
    row = dataclasses.asdict(case.row())
    names = ("method", "model", "args", "resolution", "batch", "gflops", "tokens", "published")
    return {name: row[name] for name in names}


def compare(rows: list[dict[str, Any]], dense: dict[str, Any]) -> None:
    """Add each row's speed-up over dense, and its share of the ratio of GFLOPs."""
    for row in rows:
        row["speedup_over_dense"] = round(dense["ms"] / row["ms"], 3)
        share = row["speedup_over_dense"] * row["gflops"] / dense["gflops"]
        row["share"] = round(share, 3)


def table(rows: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    kinds = "products", "attention", "the rest"
    lines = [
        f"| model | method | GFLOPs | ms | {' | '.join(kinds)} | images/s | x dense | share |",
        "|---|---|" + "---:|" * 8,
    ]
    for row in rows:
        parts, name = row["ms_by_kind"], method_name(row["method"], row["args"])
        rest = parts["other"] + parts["sort"]
        lines.append(
            f"| {row['model']} | {name} | {row['gflops']:.1f} | {row['ms']:.1f} "
            f"| {parts['product']:.1f} | {parts['attention']:.1f} | {rest:.1f} "
            f"| {1e3 * BATCH / row['ms']:.0f} | {row['speedup_over_dense']:.2f} "
            f"| {row['share']:.2f} |"
        )
    return "\n".join(lines)


def operations(listed: list[Kernel], count: int = 25) -> str:
    """Write the kernels that take longest as Markdown, equal ones together."""
    groups = collections.defaultdict(list)
    for kernel in listed:
        groups[kernel.kind, kernel.source, kernel.result].append(kernel)
    lines = [
        "| kind | from | result | runs | each (us) | all (ms) |",
        "|---|---|---|---:|---:|---:|",
    ]
    for (kind, source, result), same in sorted(groups.items(), key=lambda item: -total(item[1])):
        runs, together = sum(kernel.times for kernel in same), 1e3 * total(same)
        lines.append(
            f"| {kind} | {source} | {result} | {runs} | {1e3 * together / runs:.1f} "
            f"| {together:.2f} |"
        )
    return "\n".join(lines[: count + 2])


def main() -> None:
    """Estimate rows, or list one row's kernels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="?", default="all", metavar="METHOD|MODEL|all")
    parser.add_argument("--operations", nargs=3, metavar=("METHOD", "MODEL", "ROW"))
    options = parser.parse_args()
    if options.operations:
        method, model, index = options.operations
        cases = published_cases(method, batch=BATCH)
        case = [case for case in cases if model_name(case.config) == model][int(index)]
        print(operations(kernels(compile_for_h100(case).as_text())))
        return
    cases = published_cases(options.rows, batch=BATCH)
    models = list(dict.fromkeys(model_name(case.config) for case in cases))
    rows = []
    for model in models:
        dense = next(
            c for c in published_cases("dense", batch=BATCH) if model_name(c.config) == model
        )
        chosen = [c for c in cases if model_name(c.config) == model and c.reducer.name != "dense"]
        found = []
        for case in (dense, *chosen):
            found.append(estimate(case))
            print(model, case.row().name, found[-1]["ms"], "ms", file=sys.stderr, flush=True)
        compare(found, found[0])
        rows += found
    print(table(rows))
    about = {
        "what": "estimated from XLA's compiled programs by benchmarks/roofline.py; nothing was run",
        "device": "NVIDIA H100 80GB HBM3, modelled",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "dtype": "bfloat16",
    }
    if options.rows == "all":
        RESULT.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
