"""Measure how close a reduced model's restored features are to the dense model's.

`python benchmarks/dense_features.py` measures the bundled demo, writes
benchmarks/results/dense_features.json and docs/dense_features.png, and prints the docs' table.
`--checkpoint DIR --data DIR` measures another model, whose results go to `--output FILE.json`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from rich.progress import track

import hvit_jax
from hvit_jax import InputError, Reducer, ViT, ViTConfig, demo
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.flags import ArgumentParser
from hvit_jax.costs import at_cost, cost_share
from hvit_jax.data.loader import load_batches
from hvit_jax.data.preprocess import normalize
from hvit_jax.data.source import open_source, take_evenly
from hvit_jax.system.figures import check_plot, pyplot, save_figure
from hvit_jax.system.files import check_destination, write_atomically
from hvit_jax.system.run import run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dense_features.json"
PLOT = ROOT / "docs" / "dense_features.png"
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
BATCH = 16


def settings(config: ViTConfig) -> Iterator[tuple[str, Reducer]]:
    """List what is measured: every method at several costs.

    Hourglass reconstructs after the last block, which counts, and once earlier, as in its paper.
    """
    last = config.depth - 1
    for method in hvit_jax.REDUCERS:
        found = dict.fromkeys(at_cost(method, config, share) for share in SHARES)
        for reducer in found if method != "dense" else ():
            if method == "hourglass":
                yield method, dataclasses.replace(reducer, reconstruct_location=last)
                early = max(reducer.cluster_location + 1, 2 * config.depth // 3)
                name = f"hourglass, back after block {early}"
                yield name, dataclasses.replace(reducer, reconstruct_location=early)
            else:
                yield method, reducer


def restored(model: ViT, images: Float[Array, "B H W 3"]) -> list[Float[Array, "B P C"]]:
    """Put the tokens after every block back on the grid of patches."""
    features = model.features(images)
    return [
        model.reducer.restore(tokens, state)
        for tokens, state in zip(features.tokens, features.states, strict=True)
    ]


def compare(reduced: ViT, dense: ViT):
    """Compile the cosine between two models' features: uint8 pictures to (depth, B, P)."""
    graphs, states = zip(*(nnx.split(model) for model in (reduced, dense)), strict=True)

    @jax.jit
    def cosines(states, pixels):
        models = map(nnx.merge, graphs, states)
        images = normalize(pixels, dense.preprocessing.mean, dense.preprocessing.std)
        pairs = zip(*(restored(model, images) for model in models), strict=True)
        return jnp.stack([_cosine(*pair) for pair in pairs])

    return lambda pixels: cosines(states, pixels)


def _cosine(x: Float[Array, "B P C"], y: Float[Array, "B P C"]) -> Float[Array, "B P"]:
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / norms


def measure(dense: ViT, checkpoint: str, batches: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """Measure every setting on the same pictures."""
    rows = []
    for name, reducer in track(list(settings(dense.config)), "settings"):
        cosines = compare(hvit_jax.load(checkpoint, reducer), dense)
        values = np.concatenate([np.asarray(cosines(pixels)) for pixels in batches], axis=1)
        rows.append(
            {
                "name": name,
                "method": reducer.name,
                "args": reducer.options(),
                "gflops_share": cost_share(dense.config, reducer),
                "cosine": values.mean((1, 2)).round(5).tolist(),
                "cosine_5_percent": np.quantile(values, 0.05, axis=(1, 2)).round(5).tolist(),
            }
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the cosine block by block near 0.6 of the cost, and at the end against the cost."""
    figure, (blocks, costs) = pyplot().subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        own = [row for row in rows if row["name"] == name]
        style = {"color": f"C{index}", "marker": "o", "markersize": 4}
        style["linestyle"] = "--" if "," in name else "-"
        near = min(own, key=lambda row: abs(row["gflops_share"] - 0.6))
        label = f"{name} ({near['gflops_share']:.2f})"
        blocks.plot(range(len(near["cosine"])), near["cosine"], label=label, **style)
        costs.plot([r["gflops_share"] for r in own], [r["cosine"][-1] for r in own], **style)
    blocks.set(xlabel="after block", ylabel="mean cosine with the dense model's features")
    blocks.legend(title="GFLOPs, as a share of dense", fontsize=8, title_fontsize=8)
    costs.set(xlabel="GFLOPs, as a share of dense", ylabel="mean cosine after the last block")
    for panel in (blocks, costs):
        panel.grid(alpha=0.3)
    save_figure(figure, path)


def table(rows: list[dict[str, Any]]) -> str:
    """Format what is nearest to 0.6 of the dense cost as Markdown."""
    depth = len(rows[0]["cosine"])
    head = ["method", "x GFLOPs", *(f"block {index}" for index in range(depth)), "worst 5 %"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (depth + 2)]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        near = min(own, key=lambda row: abs(row["gflops_share"] - 0.6))
        cells = [f"{value:.3f}" for value in (*near["cosine"], near["cosine_5_percent"][-1])]
        lines.append(f"| {name} | {near['gflops_share']:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, write the results and the plot, and print the table; returns the exit status."""
    return run(_main, "dense_features.py")


def _main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default=str(demo.checkpoint_dir()), metavar="DIR")
    parser.add_argument("--data", default=str(demo.images_dir()), metavar="DIR")
    parser.add_argument("--pictures", type=int, default=256, metavar="N")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE.json")
    options = parser.parse_args()
    if options.output.suffix != ".json":
        raise InputError(f"--output takes a .json file, got {options.output}")
    if options.pictures < 2:
        raise InputError(f"--pictures must be at least 2, got {options.pictures}")
    picture = PLOT if options.output == RESULTS else options.output.with_suffix(".png")
    check_destination(options.output, overwrite=True)
    check_plot(picture, "--output")
    dense = hvit_jax.load(options.checkpoint)
    source = take_evenly(open_source(options.data), options.pictures)
    loading = {"batch_size": BATCH, "workers": 0, "preprocessing": dense.preprocessing}
    with load_batches(source, dense.config.image_shape, **loading) as batches:
        pixels = [batch.pixels[batch.valid] for batch in batches]
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "model": dataclasses.asdict(read_description(options.checkpoint).config),
        "pictures": len(source),
    }
    rows = measure(dense, options.checkpoint, pixels)
    text = json.dumps({**about, "rows": rows}, indent=1) + "\n"
    write_atomically(options.output, lambda file: file.write(text.encode()))
    plot(rows, picture)
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
