"""Measure how many pictures a core decodes and prepares a second.

`python benchmarks/decode.py` times `hvit_jax.data` on bundled photographs, resized to the 500 x 375
pixels that ImageNet's pictures have on average and saved as JPEG of quality 90, in one thread; it
prints images per second and writes benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from pathlib import Path

from PIL import Image

import hvit_jax
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.profiling.device import describe_device

SIZE, QUALITY = (500, 375), 90
RESOLUTIONS = (384, 512, 518)
ROUNDS, PICTURES = 7, 40


def encoded() -> list[bytes]:
    """Give the photographs as JPEG files of ImageNet's usual size."""
    files = []
    folder = Path(hvit_jax.__file__).parent / "demo" / "pictures"
    for path in sorted(folder.glob("*.jpg")):
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").resize(SIZE).save(buffer, "JPEG", quality=QUALITY)
        files.append(buffer.getvalue())
    return files


def rate(files: list[bytes], resolution: int) -> float:
    """Give the median of images per second over some rounds of processor time.

    Args:
        files: JPEG files, taken in turn.
        resolution: of the prepared pictures.
    """
    rates = []
    for _ in range(ROUNDS):
        started = time.process_time()  # A machine that does other things too does not count.
        for index in range(PICTURES):
            picture = Image.open(io.BytesIO(files[index % len(files)]))
            resize_and_crop(picture, (resolution, resolution))
        rates.append(PICTURES / (time.process_time() - started))
    return statistics.median(rates)


def main() -> None:
    """Measure, print and write; there are no options but --help."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    files = encoded()
    rates = {str(size): round(rate(files, size), 1) for size in RESOLUTIONS}
    about = {
        "unit": "images per second of one core: JPEG to pixels",
        "picture": {
            "size": SIZE,
            "quality": QUALITY,
            "mean_bytes": sum(map(len, files)) // len(files),
        },
        "device": describe_device(),
        "images_per_second": rates,
    }
    path = Path(__file__).parent / "results" / "decode.json"
    path.write_text(json.dumps(about, indent=2) + "\n")
    for size, value in rates.items():
        print(f"{size:>4} pixels: {value:6.1f} images/s")


if __name__ == "__main__":
    main()
