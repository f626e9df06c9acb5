"""Evaluate 100,000 pictures and watch the memory of the process.

`python benchmarks/long_run.py` links the bundled pictures a hundred times over, scores them at 28
pixels, and writes benchmarks/results/long_run.json: resident memory after every 5,000 pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import hvit_jax
from hvit_jax import demo
from hvit_jax.data.source import open_source
from hvit_jax.distributed.placement import place
from hvit_jax.evaluation.loop import BatchSharding, score
from hvit_jax.evaluation.step import compile_step
from hvit_jax.evaluation.tally import Tally

RESULTS = Path(__file__).parent / "results" / "long_run.json"
BATCH, EVERY, RESOLUTION = 100, 5_000, 28


def resident_bytes() -> int:
    """Read how much memory this process holds; Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def link_pictures(folder: Path, times: int) -> None:
    """Fill class folders with links to the bundled pictures, each under several names."""
    for picture in demo.images_dir().glob("*/*.png"):
        place = folder / picture.parent.name
        place.mkdir(exist_ok=True)
        for index in range(times):
            (place / f"{index:03d}-{picture.name}").symlink_to(picture)


def watch(folder: Path, workers: int) -> list[dict[str, float]]:
    """Score all pictures; tells memory and time on the way."""
    model = hvit_jax.load(demo.checkpoint_dir(), "hourglass", resolution=RESOLUTION)
    source, tally, rows = open_source(str(folder)), Tally(), []
    started = time.perf_counter()

    def on_batch(tally: Tally) -> None:
        if tally.totals.images % EVERY == 0:
            seconds, memory = time.perf_counter() - started, resident_bytes()
            rows.append({"images": tally.totals.images, "seconds": seconds, "bytes": memory})
            print(f"{tally.totals.images} pictures, {memory / 1e6:.0f} MB", flush=True)

    placement, sharding = place(), BatchSharding(len(source), BATCH)
    step = compile_step(model, BATCH, placement)
    with sharding.load(source, model.config.image_shape, workers) as batches:
        labels = np.array(source.labels, np.int32)
        score(step, batches, labels, tally, placement.shard_batch, on_batch=on_batch)
    print(f"top-1 {tally.totals.percent(tally.totals.correct):.2f} %")
    return rows


def main() -> None:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("-j", "--workers", type=int, default=0, metavar="N", help="default: 0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        link_pictures(Path(folder), options.times)
        rows = watch(Path(folder), options.workers)
    about = {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "workers": options.workers,
    }
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
