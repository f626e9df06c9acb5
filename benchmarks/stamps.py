"""Measure segmentation under every method, on labelled pictures that need no network.

`python benchmarks/stamps.py WORK` builds scenes of Tux Paint's stamps in WORK
(`stamp_scenes.py`), trains a small ViT with a linear decoder on them, and measures it under every
method at three costs: mIoU, boundary F1 and pictures a second. It writes
benchmarks/results/stamps.json and docs/stamps.png, and prints the docs' tables. Steps whose results
are in WORK are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt8
from rich.progress import track
from scipy import ndimage
from stamp_scenes import CLASSES, STAMPS, write_scenes

import hvit_jax
from hvit_jax import Reducer, ViT, ViTConfig
from hvit_jax.checkpoint import fitted_parameters, read_description
from hvit_jax.costs import at_cost, count_flops
from hvit_jax.data.preprocess import normalize
from hvit_jax.dense.folders import open_scenes
from hvit_jax.dense.metrics import IGNORED, Segmentation
from hvit_jax.dense.windows import resize_pixels
from hvit_jax.models.compiled import part_weights
from hvit_jax.models.parameters import build_model
from hvit_jax.ops.resizing import resize_map
from hvit_jax.pictures import Preprocessing
from hvit_jax.profiling.device import describe_device, device_work, time_in_turns
from hvit_jax.system.figures import pyplot, save_figure
from hvit_jax.system.files import read_json, write_json
from hvit_jax.system.run import run
from hvit_jax.training import TrainConfig, train

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "stamps.json"
FIGURE = ROOT / "docs" / "stamps.png"
SIZE = 144  # Sides of a scene, and of the model's pictures: 24 x 24 patches.
MODEL = {"patch_size": 6, "depth": 6, "width": 64, "heads": 2, "mlp_width": 192}
SHARES = (0.8, 0.6, 0.4)
TOLERANCE = 2  # Pixels that an outline may be off.
BATCH = 8
# Of Hourglass at 0.6 of the cost, beside its defaults: those set for Segmenter, for SAM, another.
TEMPERATURES = ((0.1, 0.1), (0.02, 0.02), (0.01, 0.01))
AUTOMATIC = {"cluster_temperature": "auto", "reconstruct_temperature": "auto"}


def train_model(work: Path, data: Path, epochs: Sequence[float]) -> Path:
    """Train on small crops, then on whole scenes; give the checkpoint."""
    common: dict[str, Any] = dict(
        data=str(data), task="segmentation", batch_size=32, log_every=10, label_smoothing=0.0
    )
    crops = TrainConfig(
        **common,
        **MODEL,
        output=work / "crops",
        resolution=SIZE // 2,
        scale_range=(0.5, 1.0),
        epochs=epochs[0],
        learning_rate=2e-3,
        val="none",
        resume=(work / "crops").exists(),
    )
    whole = TrainConfig(
        **common,
        output=work / "whole",
        checkpoint=train(crops).checkpoint,
        resolution=SIZE,
        scale_range=(0.9, 1.3),
        epochs=epochs[1],
        learning_rate=5e-4,
        val="none",
        resume=(work / "whole").exists(),
    )
    return train(whole).checkpoint


@dataclass(frozen=True)
class Test:
    """Scenes in memory.

    Attributes:
        pixels: of all of them.
        labels: their truth.
    """

    pixels: UInt8[np.ndarray, "N H W 3"]
    labels: Int[np.ndarray, "N H W"]

    @classmethod
    def read(cls, folder: Path, count: int) -> Test:
        """Read the first scenes of a folder."""
        scenes = open_scenes(folder)
        pixels = [np.asarray(scenes.open(index)) for index in range(count)]
        labels = [scenes.truth(index, (SIZE, SIZE), len(CLASSES)) for index in range(count)]
        return cls(np.stack(pixels), np.stack([each for each in labels if each is not None]))


@dataclass(frozen=True)
class Setting:
    """What is measured: a method, at a resolution, as a share of the dense model's cost."""

    name: str
    reducer: Reducer
    config: ViTConfig
    share: float

    @classmethod
    def of(cls, name: str, reducer: Reducer, config: ViTConfig, full: ViTConfig) -> Setting:
        """Reckon the share; a picture is counted whatever the resolution."""
        reducer = reducer.resolve(config)
        return cls(
            name, reducer, config, count_flops(config, reducer) / count_flops(full, Reducer())
        )


def settings(config: ViTConfig) -> Iterator[Setting]:
    """List every method at every cost that it comes near, and smaller pictures as a baseline."""
    yield Setting.of("dense", Reducer(), config, config)
    for method in hvit_jax.REDUCERS:
        found = [] if method == "dense" else [at_cost(method, config, share) for share in SHARES]
        for reducer in dict.fromkeys(found):
            yield Setting.of(method, reducer, config, config)
            if method == "hourglass":
                automatic = dataclasses.replace(reducer, **AUTOMATIC)
                yield Setting.of("hourglass, auto", automatic, config, config)
    for pair in TEMPERATURES:
        own = dict(zip(AUTOMATIC, pair, strict=True))
        reducer = dataclasses.replace(at_cost("hourglass", config, 0.6), **own)
        yield Setting.of(f"hourglass, {pair[0]}, {pair[1]}", reducer, config, config)
    sides = range(config.patch_size, SIZE, config.patch_size)
    smaller = [
        Setting.of(
            "smaller pictures", Reducer(), dataclasses.replace(config, resolution=side), config
        )
        for side in sides
    ]
    for share in SHARES:
        yield min(smaller, key=lambda each: abs(each.share - share))


class Runner:
    """Labels pictures under one setting."""

    def __init__(self, checkpoint: Path, setting: Setting):
        """Make the model of a checkpoint for a setting."""
        parameters = fitted_parameters(checkpoint, setting.config)
        model = build_model(setting.config, setting.reducer, parameters)
        with_weights, self.weights = part_weights(model)
        self.side = setting.config.image_shape[0]
        how = read_description(checkpoint).preprocessing

        @jax.jit
        def label(weights, pixels):
            return _labels(with_weights(weights), pixels, how)

        self.label = label

    def prepare(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> np.ndarray:
        """Resize pictures to the model's size."""
        if self.side == pixels.shape[1]:
            return pixels
        small = [resize_pixels(each, (self.side, self.side)) for each in pixels]
        return np.rint(small).astype(np.uint8)

    def __call__(self, pixels: UInt8[np.ndarray, "N H W 3"]) -> Int[np.ndarray, "N H W"]:
        """Label pictures, a batch at a time."""
        prepared = self.prepare(pixels)
        starts = range(0, len(prepared), BATCH)
        return np.concatenate(
            [
                np.asarray(self.label(self.weights, prepared[start : start + BATCH]))
                for start in starts
            ]
        )


def speeds(
    runners: Sequence[Runner], pixels: UInt8[np.ndarray, "N H W 3"], rounds: int = 7
) -> list[float]:
    """Measure pictures a second: the fastest of some rounds in turns, for others use the cores."""
    batches = [jnp.asarray(runner.prepare(pixels[:BATCH])) for runner in runners]
    works = [
        device_work(functools.partial(runner.label, runner.weights, batch))
        for runner, batch in zip(runners, batches, strict=True)
    ]
    # Of no length: one call a turn.
    return [BATCH / min(times) for times in time_in_turns(works, seconds=0, rounds=rounds)]


def _labels(model: ViT, pixels, how: Preprocessing):
    logits = resize_map(model.masks(normalize(pixels, how.mean, how.std)), (SIZE, SIZE))
    return logits.argmax(-1).astype(jnp.uint8)


def outline(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Mark the pixels of a mask that have a neighbour outside it; what is beyond continues it."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _near(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Mark what is within the tolerance of a mask."""
    if not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask) <= TOLERANCE


def boundary_f1(found: Int[np.ndarray, "N H W"], labels: Int[np.ndarray, "N H W"]) -> float:
    """Compute the F1 of the classes' outlines, in per cent: the mean over classes.

    Pixels of a predicted outline are right within 2 pixels of the true one, and the other way
    round; both are counted over all pictures. The half transparent rims, which have no label, are
    given to the nearest that has one.
    """
    counts = np.zeros((len(CLASSES), 4))  # Predicted, right, true, found.
    for prediction, truth in zip(found, labels, strict=True):
        nearest = ndimage.distance_transform_edt(
            truth == IGNORED, return_distances=False, return_indices=True
        )
        filled = truth[tuple(nearest)]
        for label in np.union1d(prediction, filled):
            own, true = outline(prediction == label), outline(filled == label)
            counts[label] += own.sum(), (own & _near(true)).sum(), 0, 0
            counts[label] += 0, 0, true.sum(), (true & _near(own)).sum()
    counts = counts[counts[:, 0] + counts[:, 2] > 0]
    precision, recall = (
        counts[:, right] / np.maximum(counts[:, all], 1) for all, right in ((0, 1), (2, 3))
    )
    return float(100 * (2 * precision * recall / np.maximum(precision + recall, 1e-9)).mean())


def measure(
    checkpoint: Path, wanted: Sequence[Setting], tests: dict[str, Test], store: Path
) -> list[dict[str, Any]]:
    """Measure settings on all tests; what `store` holds of an earlier run is not repeated."""
    rows, metric = read_json(store)["rows"] if store.exists() else [], Segmentation(CLASSES)
    runners = [Runner(checkpoint, setting) for setting in wanted]
    pairs = list(zip(wanted, runners, strict=True))[len(rows) :]
    for setting, runner in track(pairs, "settings"):
        row: dict[str, Any] = {
            "name": setting.name,
            "method": setting.reducer.name,
            "args": setting.reducer.options(),
            "resolution": runner.side,
            "gflops_share": round(setting.share, 4),
        }
        for name, test in tests.items():
            found = runner(test.pixels).astype(np.int32)
            pairs = zip(found, test.labels, strict=True)
            scores = metric.scores(sum(metric.measure(*pair) for pair in pairs), len(found))
            row[name] = {
                "miou": round(scores["miou"], 2),
                "aacc": round(scores["aacc"], 2),
                "boundary_f1": round(boundary_f1(found, test.labels), 2),
            }
        rows.append(row)
        write_json(store, {"rows": rows})
    for row, found in zip(rows, speeds(runners, tests["new"].pixels), strict=True):
        row["images_per_second"] = round(found, 2)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows as Markdown."""
    dense = rows[0]
    lines = [
        "| method | x GFLOPs | mIoU, new stamps | boundary F1 | mIoU, known stamps | boundary F1 | "
        "x images/s |",
        "|---|" + "---:|" * 6,
    ]
    for row in rows:
        cells = [f"{row['gflops_share']:.2f}"]
        for test in ("new", "known"):
            cells += [f"{row[test][key]:.1f}" for key in ("miou", "boundary_f1")]
        cells.append(f"{row['images_per_second'] / dense['images_per_second']:.2f}")
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(checkpoint: Path, shown: Sequence[Setting], test: Test, path: Path) -> None:
    """Draw some scenes: the picture, its truth, and what the settings make of it."""
    names = ["picture", "truth", *(f"{each.name}, {each.share:.2f}" for each in shown)]
    pixels, labels = test.pixels[:4], test.labels[:4]
    maps = [labels, *(Runner(checkpoint, each)(pixels) for each in shown)]
    figure, axes = pyplot().subplots(
        len(pixels), len(names), figsize=(1.9 * len(names), 2 * len(pixels)), layout="constrained"
    )
    for row, picture in zip(axes, pixels, strict=True):
        row[0].imshow(picture)
    for column, found in enumerate(maps, start=1):
        for row, one in zip(axes, found, strict=True):
            shown_map = np.ma.masked_equal(one, IGNORED)
            row[column].imshow(shown_map, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
    for panel, name in zip(axes[0], names, strict=True):
        panel.set_title(name, fontsize=9)
    for panel in axes.ravel():
        panel.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=110)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--stamps", type=Path, default=STAMPS, metavar="DIR")
    parser.add_argument(
        "--epochs", type=float, nargs=2, default=(14.0, 0.4), metavar="N", help="of both stages"
    )
    parser.add_argument(
        "--scenes", type=int, default=40, metavar="N", help="to test on, of either kind"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE.json")
    parser.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE.png")
    options = parser.parse_args()
    data, about = options.work / "scenes", options.work / "stamps.json"
    if not data.exists():
        options.work.mkdir(parents=True, exist_ok=True)
        write_json(about, write_scenes(data, stamps=options.stamps, size=SIZE))
    checkpoint = train_model(options.work, data, options.epochs)
    tests = {
        "new": Test.read(data, options.scenes),
        "known": Test.read(data / "seen", options.scenes),
    }
    config = read_description(checkpoint).config
    rows = measure(checkpoint, list(settings(config)), tests, options.work / "rows.json")
    write_json(
        options.output,
        {
            **describe_device(),
            "stamps": read_json(about),
            "scenes": {name: len(test.pixels) for name, test in tests.items()},
            "epochs": list(options.epochs),
            "model": dataclasses.asdict(config),
            "rows": rows,
        },
    )
    automatic = dataclasses.replace(at_cost("hourglass", config, 0.6), **AUTOMATIC)
    shown = [
        Setting.of(name, reducer, config, config)
        for name, reducer in (
            ("dense", Reducer()),
            ("hourglass, auto", automatic),
            ("tome", at_cost("tome", config, 0.6)),
            ("evit", at_cost("evit", config, 0.6)),
        )
    ]
    draw(checkpoint, shown, tests["known"], options.figure)
    print(table(rows))


def main() -> int:
    """Run the command; returns the exit status."""
    return run(_main, "stamps.py")


if __name__ == "__main__":
    sys.exit(main())
