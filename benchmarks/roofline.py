"""Estimate on a machine without a GPU how fast an H200 runs the laboratory's rows.

XLA compiles the programs for an H200 as it would there (only cuBLAS's choice of kernels needs the
card), and `hlo_costs` adds up what their kernels cost. Figures are estimates, not measurements:
they show where the time goes, what a change gives and whether a method can reach its share.

`python benchmarks/roofline.py` prints a table of what `laboratory.py` measures, beside what was
measured, and writes benchmarks/results/roofline-h200.json; `--published` adds all other published
rows. With `--operations` it lists the kernels of the rows that `--rows` chooses. `--programs
FOLDER` keeps the compiled programs and takes those that are there, so that it goes on where it was
stopped. It needs `pip install "jax[cuda12]"`, and a few minutes for a row of ToMe.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
from laboratory import BATCH, Row, plan, program_name, reference

import hvit_jax
from hvit_jax.architectures import model_name
from hvit_jax.config import Compute
from hvit_jax.models.vit import ViT
from hvit_jax.ops.attention import cudnn, hopper
from hvit_jax.ops.platform import compiled_for, compiler_options
from hvit_jax.profiling.cases import make_case, published_cases
from hvit_jax.reducers import method_name

HERE = Path(__file__).parent
RESULT = HERE / "results" / "roofline-h200.json"
MEASURED = HERE / "results" / "nvidia-h200.json"
KINDS = ("product", "attention", "other", "sort")


def compile_for_h200(row: Row) -> Any:
    """Compile a row's program; nothing is run and no array is made."""

    def make():
        return ViT(row.config, row.reducer, rngs=nnx.Rngs(0), compute=row.compute)

    target = (HERE / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    graph, state = nnx.split(nnx.eval_shape(make))
    images = jax.ShapeDtypeStruct((row.batch, *row.config.image_shape, 3), jnp.float32)
    state, images = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, images)
    )
    checks = "jax._src.cudnn.fused_attention_stablehlo"
    with (
        mock.patch(f"{checks}.check_cudnn_version", lambda: 91000),
        mock.patch(f"{checks}.check_compute_capability", lambda wanted: True),
        mock.patch.object(cudnn, "obstacle", lambda dtype, size: None),
        mock.patch.object(hopper, "obstacle", lambda dtype, size: None),
        compiled_for("gpu"),
    ):
        model = jax.jit(
            lambda state, images: nnx.merge(graph, state)(images),
            compiler_options=compiler_options(),
        )
        return model.lower(state, images).compile()


def rows(published: bool) -> Iterator[Row]:
    """List what can be estimated: neither gradients nor what XLA tunes on the card."""
    # Each part has its dense model.
    measured = {(row.name, row.compute): row for part in plan(small=False) for row in part}.values()
    yield from (row for row in measured if not row.gradient and not row.options)
    if published:
        known = {row.name for row in measured}
        for case in published_cases("all", batch=BATCH):
            method = method_name(case.reducer.name, case.reducer.options())
            name = f"{model_name(case.config)} {method}"
            if name not in known:
                yield Row(name, case.config, case.reducer, BATCH, Compute("bfloat16"))


def program(row: Row, folder: Path) -> str:
    """Read a row's program, or compile it and keep its text."""
    path = folder / program_name(row)
    if not path.exists():
        path.write_bytes(gzip.compress(compile_for_h200(row).as_text().encode()))
    return gzip.decompress(path.read_bytes()).decode()


def estimate(row: Row, listed: list[Kernel]) -> dict[str, Any]:
    """Estimate one row from its kernels, without what needs the dense row."""
    by_kind = collections.Counter()
    for kernel in listed:
        by_kind[kernel.kind] += 1e3 * kernel.times * kernel.seconds
    products = sum(kernel.times * kernel.flops for kernel in listed) / 2e9 / row.batch
    return {
        "row": row.name,
        "unrolled": row.compute.unroll,
        "batch": row.batch,
        "gflops": make_case(row.config, row.reducer, row.batch).gflops,
        "multiply_adds_of_products": round(products, 1),
        "launches": sum(kernel.times for kernel in listed),
        "ms": round(1e3 * total(listed), 3),
        "ms_by_kind": {kind: round(by_kind[kind], 3) for kind in KINDS},
    }


def compare(found: dict[str, Any], dense: dict[str, Any], measured: list[dict[str, Any]]) -> None:
    """Add the speed-up over dense, its share of the GFLOPs' ratio, and the measured time."""
    found["x_dense"] = round(dense["ms"] / found["ms"], 3)
    found["share"] = round(found["x_dense"] * found["gflops"] / dense["gflops"], 3)
    for row in measured:
        same = all(row.get(name) == found[name] for name in ("row", "unrolled", "batch"))
        if same and not row.get("older_code"):
            found["measured_ms"] = row["ms"]


def table(found: list[dict[str, Any]]) -> str:
    """Write rows as Markdown."""
    kinds = "products", "attention", "the rest"
    lines = [
        f"| row | GFLOPs | ms | {' | '.join(kinds)} | x dense | share | measured ms | off by |",
        "|---|" + "---:|" * 9,
    ]
    for row in found:
        parts, name = row["ms_by_kind"], row["row"] + " (unrolled)" * row["unrolled"]
        rest, real = parts["other"] + parts["sort"], row.get("measured_ms")
        lines.append(
            f"| {name} | {row['gflops']:.1f} | {row['ms']:.1f} | {parts['product']:.1f} "
            f"| {parts['attention']:.1f} | {rest:.1f} | {row['x_dense']:.2f} | {row['share']:.2f} "
            + (f"| {real:.1f} | {row['ms'] / real - 1:+.1%} |" if real else "| | |")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Estimate rows, or list the kernels of some."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="", help="only rows whose names this pattern is found in")
    parser.add_argument("--published", action="store_true", help="all other published rows too")
    parser.add_argument("--operations", action="store_true", help="list the kernels of each row")
    parser.add_argument("--programs", type=Path, help="a folder for compiled programs")
    parser.add_argument("--output", type=Path, help="where the results go, of some rows too")
    options = parser.parse_args(arguments)
    output = options.output or (None if options.rows else RESULT)
    about = {
        "what": "estimated from XLA's compiled programs by benchmarks/roofline.py; nothing was run",
        "device": "NVIDIA H200, modelled",
        "versions": {
            "hvit_jax": hvit_jax.__version__,
            **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        },
    }
    measured = json.loads(MEASURED.read_text())["rows"]
    every, found, dense = list(rows(options.published)), [], {}
    chosen = [row for row in every if re.search(options.rows, row.name)]
    with tempfile.TemporaryDirectory() as passing:
        folder = options.programs or Path(passing)
        folder.mkdir(parents=True, exist_ok=True)
        for row in chosen:
            listed = kernels(program(row, folder))
            if options.operations:
                print(f"{row.name}\n\n{operations(listed)}\n", flush=True)
                continue
            found.append(estimate(row, listed))
            size = row.config, row.batch
            if size not in dense:
                first = reference(row, every)
                dense[size] = estimate(first, kernels(program(first, folder)))
            compare(found[-1], dense[size], measured)
            print(row.name, found[-1]["ms"], "ms", file=sys.stderr, flush=True)
            if output:
                output.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")
    if found:
        print(table(found))


if __name__ == "__main__":
    main()
