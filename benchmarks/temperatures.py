"""Compare temperatures of Hourglass on the demo: those set by hand, and the automatic ones.

`python benchmarks/temperatures.py` measures, at two costs, top-1 and how close restored features
are to the dense model's, writes benchmarks/results/temperatures.json and prints the docs' table.
`benchmarks/stamps.py` does the same for segmentation.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from rich.progress import track

import hvit_jax
from hvit_jax import Reducer, demo
from hvit_jax.costs import at_cost, cost_share
from hvit_jax.data.loader import load_batches
from hvit_jax.data.preprocess import normalize
from hvit_jax.data.source import open_source, take_evenly
from hvit_jax.profiling.device import describe_device
from hvit_jax.system.files import write_json
from hvit_jax.system.run import run

RESULTS = Path(__file__).parent / "results" / "temperatures.json"
# Of clustering and reconstruction: SWAG's and Segmenter's, SAM's, others, and the automatic ones.
TEMPERATURES = ((1.0, 0.05), (0.1, 0.1), (0.02, 0.02), (0.01, 0.01), ("auto", "auto"))
_OPTIONS = ("cluster_temperature", "reconstruct_temperature")
SHARES = (0.6, 0.4)
PICTURES, BATCH = 250, 50


def run_model(
    reducer: Reducer, pixels: np.ndarray
) -> tuple[np.ndarray, Float[np.ndarray, "N P C"]]:
    """Classify pictures, and compute the features of their patches."""
    model = hvit_jax.load(demo.checkpoint_dir(), reducer)
    compiled, classes, patches = hvit_jax.jit_model(model), [], []
    for start in range(0, len(pixels), BATCH):
        features = compiled.features(normalize(pixels[start : start + BATCH]))
        classes.append(np.asarray(features.output.argmax(-1)))
        found = model.ln(model.reducer.restore(features.tokens[-1], features.states[-1]))
        patches.append(np.asarray(found / jnp.linalg.norm(found, axis=-1, keepdims=True)))
    return np.concatenate(classes), np.concatenate(patches)


def measure() -> list[dict[str, Any]]:
    """Measure all settings on the same pictures."""
    source = take_evenly(open_source(str(demo.images_dir())), PICTURES)
    config = hvit_jax.load(demo.checkpoint_dir()).config
    with load_batches(source, config.image_shape, batch_size=BATCH, workers=0) as batches:
        pixels = np.concatenate([batch.pixels[batch.valid] for batch in batches])
    labels = np.array(source.labels)
    classes, dense = run_model(Reducer(), pixels)
    rows = [{"args": {}, "gflops_share": 1.0, "top1": _percent(classes == labels), "cosine": 1.0}]
    settings = [(share, pair) for share in SHARES for pair in TEMPERATURES]
    for share, (cluster, back) in track(settings, "settings"):
        own = dict(zip(_OPTIONS, (cluster, back), strict=True))
        reducer = dataclasses.replace(at_cost("hourglass", config, share), **own)
        classes, found = run_model(reducer, pixels)
        rows.append(
            {
                "args": reducer.options(),
                "gflops_share": round(cost_share(config, reducer), 4),
                "top1": _percent(classes == labels),
                "cosine": round(float((found * dense).sum(-1).mean()), 5),
            }
        )
    return rows


def _percent(right: np.ndarray) -> float:
    return round(100 * float(right.mean()), 2)


def _main() -> None:
    rows = measure()
    write_json(RESULTS, {**describe_device(), "pictures": PICTURES, "rows": rows})
    print("| temperatures | x GFLOPs | top-1 (%) | cosine with dense |\n|---|---:|---:|---:|")
    for row in rows:
        of = [str(row["args"].get(name, "dense")) for name in _OPTIONS]
        numbers = f"{row['gflops_share']:.2f} | {row['top1']:.1f} | {row['cosine']:.4f}"
        print(f"| {', '.join(of)} | {numbers} |")


def main() -> int:
    """Run the command; returns the exit status."""
    return run(_main, "temperatures.py")


if __name__ == "__main__":
    sys.exit(main())
