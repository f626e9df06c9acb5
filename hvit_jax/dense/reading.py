"""Reading pictures of a data set with their truth, in other processes, for `WindowStream`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hvit_jax.data.picture import PictureError
from hvit_jax.dense.folders import Scenes
from hvit_jax.dense.stream import Job
from hvit_jax.dense.windows import Layout, View
from hvit_jax.pictures import Triple


@dataclass(frozen=True)
class Read:
    """Read one picture, its views and its truth; what is wrong travels with it."""

    scenes: Scenes
    layout: Layout
    mean: Triple
    scales: tuple[float, ...]
    flip: bool
    outputs: int
    draw: bool
    first: int

    def __call__(self, place: int) -> dict[str, Any]:
        """Read the picture at a place behind the first; `job_of` makes a job of what this gives."""
        index = self.first + place
        try:
            picture = np.asarray(self.scenes.open(index))
            truth = self.scenes.truth(index, picture.shape[:2], self.outputs)
            views = self.layout.views(picture, self.mean, self.scales, self.flip)
        except (PictureError, MemoryError) as error:
            problem = str(error) or f"picture {self.scenes.paths[index]}: not enough memory"
            return {"index": index, "problem": problem}
        row: dict[str, Any] = {
            "index": index,
            "problem": "",
            "size": np.array(picture.shape[:2]),
            "pixels": [view.pixels for view in views],
            "shown": [np.array(view.shown) for view in views],
            "mirrored": [np.array(view.mirrored) for view in views],
        }
        row |= {} if truth is None else {"truth": truth}
        return row | ({"picture": picture} if self.draw else {})


def job_of(row: dict[str, Any], waited: float) -> Job:
    """Make a picture's job of what `Read` gave, and the seconds that were waited for it."""
    if row["problem"]:
        return Job(row["index"], (0, 0), problem=row["problem"], waited=waited)
    views = [
        View(pixels, (int(shown[0]), int(shown[1])), bool(mirrored))
        for pixels, shown, mirrored in zip(
            row["pixels"], row["shown"], row["mirrored"], strict=True
        )
    ]
    height, width = map(int, row["size"])
    truth, picture = row.get("truth"), row.get("picture")
    return Job(row["index"], (height, width), views, truth, picture, waited=waited)
