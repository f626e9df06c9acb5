"""Pictures of a report: the user's own, as settings see them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hvit_jax.comparing.classifying import Whole
from hvit_jax.comparing.mapping import Maps, subset
from hvit_jax.comparing.settings import Setting
from hvit_jax.comparing.trials import Bench
from hvit_jax.data.preprocess import resize_and_crop
from hvit_jax.dense.drawing import colour_depth, colour_labels, draw_over
from hvit_jax.dense.metrics import Segmentation
from hvit_jax.dense.stream import WindowStream
from hvit_jax.visualization.draw import draw_groups, enlarged
from hvit_jax.visualization.maps import as_large
from hvit_jax.visualization.view import compile_views

SIDE = 240  # Of a drawing, in pixels, about.
Picture = UInt8[np.ndarray, "_ _ 3"]


def draw(bench: Bench, places: Sequence[int], setting: Setting | None) -> list[Picture]:
    """Draw some pictures of the sample under a setting.

    Of models that make maps the map is drawn over the picture, of others the groups that patches
    form behind the last block; dropped patches are dark.

    Args:
        bench: what runs the model.
        places: of the pictures in the sample.
        setting: what runs; None: the pictures as they are.
    """
    drawn = _maps if isinstance(bench, Maps) else _groups
    return [_small(each) for each in drawn(bench, places, setting)]


def _groups(bench: Bench, places: Sequence[int], setting: Setting | None) -> list[Picture]:
    assert isinstance(bench, Whole)
    sizes = bench.sizes if setting is None else setting.sizes(bench.sizes)
    how, shape = bench.scoring.preprocessing, sizes.image_shape
    pictures = [bench.sample.open(place) for place in places]
    shown = [resize_and_crop(each, enlarged(shape, side=SIDE), how) for each in pictures]
    if setting is None:
        return shown
    seen = [resize_and_crop(each, shape, how) for each in pictures]
    if setting.resolution is not None:
        return [as_large(*pair) for pair in zip(seen, shown, strict=True)]
    views = compile_views(bench.model(setting), (sizes.depth - 1,), how)
    groups = [jax.device_get(views(each[None])[0][0].groups[0]) for each in seen]
    return [
        draw_groups(picture, np.asarray(each), sizes.grid)
        for picture, each in zip(shown, groups, strict=True)
    ]


def _maps(bench: Bench, places: Sequence[int], setting: Setting | None) -> list[Picture]:
    assert isinstance(bench, Maps)
    scenes = subset(bench.scenes, places)
    if setting is None:
        return [np.asarray(scenes.open(index)) for index in range(len(scenes))]
    view = bench.view_at(setting.resolution)
    stream = WindowStream(bench.model(setting), view.layout, bench.batch, bench.placement)
    drawn = []
    for job, found in stream.run(bench.jobs(view, scenes, draw=True)):
        assert found is not None and job.picture is not None
        if isinstance(bench.metric, Segmentation):
            colours = colour_labels(found, len(bench.metric.classes))
        else:
            colours = colour_depth(found)
        drawn.append(draw_over(job.picture, colours))
    return drawn


def _small(picture: Picture) -> Picture:
    """Scale a drawing down to the size that a report shows."""
    height, width = picture.shape[:2]
    share = 1.5 * SIDE / max(height, width)
    if share >= 1:
        return picture
    size = max(1, round(width * share)), max(1, round(height * share))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
