"""Measure what bfloat16, float8 and GELU by tanh change of the bundled demo's logits.

`python benchmarks/rounding.py` writes benchmarks/results/rounding.json and prints Markdown. Logits
are held against those of the exact GELU in float32: the root mean square of the differences over
their standard deviation, the largest difference over the same, and pictures that change class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hvit_jax
from hvit_jax import demo
from hvit_jax.checkpoint import read_description
from hvit_jax.data.folder import read_folder
from hvit_jax.data.loader import load_batches
from hvit_jax.data.preprocess import normalize

RESULTS = Path(__file__).parent / "results" / "rounding.json"
METHODS = ("dense", "hourglass", "evit", "tome", "evo", "ats", "act", "smyrf")
EXACT = ("float32", "exact")
KINDS = (
    EXACT,
    ("float32", "tanh"),
    ("bfloat16", "exact"),
    ("bfloat16", "tanh"),
    ("float8", "tanh"),
)


def logits(method: str, dtype: str, gelu: str, pixels: np.ndarray) -> np.ndarray:
    """Classify all pictures with the demo's model."""
    model = hvit_jax.load(demo.checkpoint_dir(), method, dtype=dtype, gelu=gelu)
    run = hvit_jax.jit_model(model)
    return np.concatenate([np.asarray(run(normalize(part))) for part in np.split(pixels, 10)])


def compare(found: np.ndarray, exact: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Hold logits against the exact ones."""
    off = (found - exact) / exact.std()
    return {
        "rms": float(np.sqrt(np.square(off).mean())),
        "largest": float(np.abs(off).max()),
        "other_class": int((found.argmax(1) != exact.argmax(1)).sum()),
        "top1": float(100 * (found.argmax(1) == labels).mean()),
    }


def main() -> None:
    """Measure, write and print; there are no options but --help."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    folder = read_folder(demo.images_dir())
    resolution = read_description(demo.checkpoint_dir()).config.image_shape
    with load_batches(folder, resolution, batch_size=100, workers=0) as batches:
        pixels = np.concatenate([batch.pixels[batch.valid] for batch in batches])
    labels = np.asarray(folder.labels)
    rows = []
    print("| method | computed in | GELU | rms | largest | other class | top-1 |")
    print("|---|---|---|---:|---:|---:|---:|")
    for method in METHODS:
        exact = logits(method, *EXACT, pixels)
        for dtype, gelu in KINDS:
            found = exact if (dtype, gelu) == EXACT else logits(method, dtype, gelu, pixels)
            row = compare(found, exact, labels)
            rows.append({"method": method, "dtype": dtype, "gelu": gelu, **row})
            numbers = f"{row['rms']:.5f} | {row['largest']:.4f} | {row['other_class']}"
            print(f"| {method} | {dtype} | {gelu} | {numbers} | {row['top1']:.1f} |", flush=True)
    about = {"jax": jax.__version__, "pictures": len(labels), "rows": rows}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
