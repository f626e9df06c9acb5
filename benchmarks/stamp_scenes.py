"""Build labelled scenes of real objects: photographs of Tux Paint's stamps on backgrounds.

`python benchmarks/stamp_scenes.py OUT` writes folders that `hvit train --task segmentation` and
`hvit segment` read:

    OUT/images/{train,val}, OUT/labels/{train,val}, OUT/classes.txt
    OUT/seen/{images,labels}: new scenes of the stamps that were trained on

The stamps (GPL-2, 161 MB) are those of Debian's package tuxpaint-stamps-default; they are never
part of this repository. As root, the script installs it itself. Stamps, not scenes, are divided
into training and test: no stamp of `val` is in `train`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from rich.progress import track

from hvit_jax import demo
from hvit_jax.dense.metrics import IGNORED
from hvit_jax.errors import InputError
from hvit_jax.system.files import new_folder
from hvit_jax.system.run import run

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("/usr/share/tuxpaint/stamps")
# The classes, by the folders whose stamps they have; the longest name that fits counts.
FOLDERS = {
    "bird": ("animals/birds",),
    "bovine": ("animals/mammals/bovines",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "fish": ("animals/fish", "animals/mammals/aquatic"),
    "insect": ("animals/insects",),
    "food": ("food",),
    "plant": ("plants",),
    "vehicle": ("vehicles",),
    "tool": ("household",),
    "instrument": ("hobbies/music",),
}
CLASSES = ("background", *FOLDERS)
_EVERY = 4  # Of a class's stamps, one in so many is for the test.


def find_stamps(folder: Path = STAMPS) -> Path:
    """Give the folder of the stamps; where there is none, install them if that is allowed.

    Raises:
        InputError: if they are missing and cannot be installed.
    """
    if folder.is_dir():
        return folder
    advice = f"install them with: apt-get install --no-install-recommends {PACKAGE}"
    if folder != STAMPS or os.geteuid() != 0 or not shutil.which("apt-get"):
        raise InputError(f"there are no stamps in {folder}; {advice}")
    print(f"installing {PACKAGE} (161 MB)", file=sys.stderr)
    command = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not folder.is_dir():
        lines = done.stderr.strip().splitlines() or ["apt-get failed"]
        raise InputError(f"{lines[-1]}; {advice}")
    return folder


def class_of(path: Path) -> int | None:
    """Find the class of a stamp by its folder, relative to the stamps'; None if it has none."""
    place = path.parent.as_posix()
    fitting = [
        (len(folder), CLASSES.index(name))
        for name, folders in FOLDERS.items()
        for folder in folders
        if f"{place}/".startswith(f"{folder}/") and "cartoon" not in path.parts
    ]
    return max(fitting)[1] if fitting else None


def is_photograph(pixels: UInt8[np.ndarray, "H W 4"]) -> bool:
    """Tell photographs from drawings: many colours, few neighbours that are equal."""
    inside = pixels[..., 3] > 127
    if min(inside.shape) < 60 or not 0.10 <= inside.mean() <= 0.98:
        return False
    colours = np.unique((pixels[inside][:, :3] >> 3) @ np.array([1024, 32, 1]))
    pairs = inside[:, 1:] & inside[:, :-1]
    equal = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(-1)
    return len(colours) > 300 and equal[pairs].mean() < 0.35


def read_stamps(folder: Path) -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
    """Read the photographs among the stamps: for every class, those to train on and to test on."""
    train, test = ([[] for _ in CLASSES] for _ in range(2))
    for path in sorted(folder.rglob("*.png")):
        label = class_of(path.relative_to(folder))
        if label is None or path.stem.endswith(("_mirror", "_flip")):
            continue
        with Image.open(path) as image:
            stamp = image.convert("RGBA")
        if not is_photograph(np.asarray(stamp)):
            continue
        stamp.thumbnail((256, 256))
        several = train if (len(train[label]) + len(test[label]) + 1) % _EVERY else test
        several[label].append(stamp)
    return train, test


class Scenes:
    """Draws scenes of some stamps."""

    def __init__(
        self, stamps: Sequence[Sequence[Image.Image]], size: int, random: np.random.Generator
    ):
        """Draw scenes of `size` x `size` pixels of the stamps of every class."""
        self.stamps, self.size, self.random = stamps, size, random
        pictures = sorted(demo.pictures_dir().glob("*.jpg"))
        self.pictures = [Image.open(path).convert("RGB") for path in pictures]

    def draw(self) -> tuple[Image.Image, Image.Image]:
        """Draw a scene: the picture, and its labels; 255 where a stamp is half transparent."""
        scene = self._background()
        labels = np.zeros((self.size, self.size), np.uint8)
        for _ in range(self.random.integers(2, 5)):
            label = int(self.random.integers(1, len(CLASSES)))
            stamp = self._stamp(label)
            left = int(self.random.integers(0, self.size - stamp.width + 1))
            top = int(self.random.integers(0, self.size - stamp.height + 1))
            scene.paste(stamp, (left, top), stamp)
            alpha = np.asarray(stamp)[..., 3] / 255.0
            here = labels[top : top + stamp.height, left : left + stamp.width]
            here[alpha >= 0.1] = IGNORED
            here[alpha > 0.9] = label
        return scene, Image.fromarray(labels)

    def _stamp(self, label: int) -> Image.Image:
        """Choose a stamp of a class, its size and its direction."""
        stamp = self.stamps[label][self.random.integers(len(self.stamps[label]))]
        side = self.random.uniform(0.25, 0.55) * self.size
        scale = side / max(stamp.size)
        size = (max(1, round(scale * stamp.width)), max(1, round(scale * stamp.height)))
        stamp = stamp.resize(size, Image.Resampling.BICUBIC)
        mirrored = self.random.random() < 0.5
        return stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else stamp

    def _background(self) -> Image.Image:
        """Make a background: a part of a photograph, or colours that change slowly, with noise."""
        size, random = self.size, self.random
        if random.random() < 0.5:
            picture = self.pictures[random.integers(len(self.pictures))]
            side = int(random.uniform(0.2, 0.6) * min(picture.size))
            left = int(random.integers(0, picture.width - side + 1))
            top = int(random.integers(0, picture.height - side + 1))
            box = (left, top, left + side, top + side)
            return picture.resize((size, size), Image.Resampling.BICUBIC, box)
        cells = int(random.integers(2, 9))
        few = random.integers(0, 256, (cells, cells, 3), np.uint8)
        slow = Image.fromarray(few).resize((size, size), Image.Resampling.BICUBIC)
        noise = random.normal(0, random.uniform(0, 15), (size, size, 3))
        return Image.fromarray((np.asarray(slow) + noise).clip(0, 255).astype(np.uint8))


def write_scenes(
    output: Path, *, stamps: Path = STAMPS, size: int = 144, train: int = 4000, test: int = 200
) -> dict[str, int]:
    """Write all scenes; the same ones each time.

    Args:
        output: the folder, which must not exist.
        stamps: where they are.
        size: sides of a scene.
        train: scenes to train on.
        test: scenes to test on, of either kind.

    Returns:
        How many stamps are for training, and for the test.
    """
    known, new = read_stamps(find_stamps(stamps))
    kinds = (
        ("images/train", known, train),
        ("images/val", new, test),
        ("seen/images", known, test),
    )
    with new_folder(output) as folder:
        for seed, (place, which, count) in enumerate(kinds):
            scenes = Scenes(which, size, np.random.default_rng(seed))
            pictures, truths = folder / place, folder / place.replace("images", "labels")
            pictures.mkdir(parents=True)
            truths.mkdir(parents=True)
            for number in track(range(count), place):
                picture, labels = scenes.draw()
                picture.save(pictures / f"{number:05}.png")
                labels.save(truths / f"{number:05}.png")
        (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    return {"train": sum(map(len, known)), "test": sum(map(len, new))}


def main() -> int:
    """Run the command; returns the exit status."""

    def work() -> None:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("output", type=Path, metavar="OUT")
        parser.add_argument("--stamps", type=Path, default=STAMPS, metavar="DIR")
        options = parser.parse_args()
        found = write_scenes(options.output, stamps=options.stamps)
        print(f"scenes of {found['train']} stamps to train on, and of {found['test']} to test on")

    return run(work, "stamp_scenes.py")


if __name__ == "__main__":
    sys.exit(main())
