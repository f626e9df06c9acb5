"""A figure of what methods do with pictures: a row for every picture, a column for every view."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import track

from hvit_jax.checkpoint import choose_method, fitted_parameters, read_description
from hvit_jax.costs import at_cost, cost_share
from hvit_jax.data.picture import open_picture
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError
from hvit_jax.fields import show
from hvit_jax.models.compiled import jit_model
from hvit_jax.models.parameters import build_model
from hvit_jax.models.reducer import Reducer
from hvit_jax.models.vit import ViT
from hvit_jax.reducers import REDUCERS, method_name, warn_without_budgets
from hvit_jax.system.figures import check_plot, pyplot, save_figure
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console
from hvit_jax.visualization.config import OTHERWISE, SHARE, VisualizeConfig
from hvit_jax.visualization.draw import draw_groups, enlarged, heat_map, lay_over
from hvit_jax.visualization.maps import draw_maps
from hvit_jax.visualization.view import BlockView, compile_views, whose_attention

INCHES, TITLE_INCHES, LINE_INCHES = 2.4, 0.6, 0.18
# Side by side; as many as can be told apart on a page.
MOST_PANELS = 8
Picture = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Panel:
    """One drawing in a figure, and the lines above it, shown in the first row only."""

    title: str
    drawing: Picture


def visualize(config: VisualizeConfig, console: Console | None = None) -> list[list[Panel]]:
    """Draw pictures as a method, or each of all methods, sees them, into a file.

    Args:
        config: which pictures, which method, and where to.
        console: shows how far it is, and is told of a method that `config` does not name and of
            one that saves nothing; default: stderr.

    Returns:
        The figure's rows, one for each picture: the picture itself, then its views; of a model that
        makes maps also those of dense and of the method, and where they differ.

    Raises:
        InputError: if a picture or the checkpoint cannot be read, the model has no such block, the
            method does not fit it, or the file cannot be written.
    """
    refuse_several("hvit visualize")
    check_plot(config.output, "--output")
    use_compilation_cache(config.cache)
    console = console or plain_console(stderr=True)
    description = read_description(config.folder).at(config.resolution)
    sizes, how = description.config, description.preprocessing
    blocks = _blocks(sizes.depth, config.after, last_only=config.compare)
    if config.compare:
        share = config.share or SHARE
        reducers = [at_cost(name, sizes, share) for name in REDUCERS if name != Reducer.name]
        title = f"All methods near {share:g} x the GFLOPs of dense"
    else:
        reducer = choose_method(config.reducer, description, console.print, OTHERWISE)
        reducers = [reducer.resolve(sizes)]
        warn_without_budgets(reducers[0], sizes, console.print)
        name = method_name(reducers[0].name, reducers[0].options())
        title = f"{name}, {cost_share(sizes, reducers[0]):.2f} x the GFLOPs of dense"
    pictures = [open_picture(Path(name), name, exif=True) for name in config.images]
    large = enlarged(sizes.image_shape)
    shown = [resize_and_crop(picture, large, how) for picture in pictures]
    seen = [resize_and_crop(picture, sizes.image_shape, how) for picture in pictures]
    columns = [[Panel("picture", picture) for picture in shown]]
    parameters = fitted_parameters(config.folder, sizes)
    hidden = len(reducers) == 1 or not console.is_terminal
    for reducer in track(reducers, "methods", console=console, disable=hidden):
        model = build_model(sizes, reducer, parameters)
        compiled = compile_views(model, blocks, how)
        found = [jax.device_get(compiled(picture[None])) for picture in seen]
        columns += _columns(model, blocks, shown, [views for views, _ in found], config.compare)
        if sizes.decoder is not None and not config.compare:
            dense = jit_model(build_model(sizes, Reducer(), parameters))
            images = [normalize(picture[None], how.mean, how.std) for picture in seen]
            maps = [np.asarray(dense(each))[0] for each in images]
            drawn = draw_maps(shown, maps, [output[0] for _, output in found], reducer.name)
            columns += [[Panel(title, each) for each in column] for title, column in drawn]
    rows = [list(row) for row in zip(*columns, strict=True)]
    _draw_figure(rows, config.output, f"{title}, {sizes.grid[0]} x {sizes.grid[1]} patches")
    return rows


def _blocks(depth: int, after: tuple[int, ...] | None, *, last_only: bool) -> tuple[int, ...]:
    """Choose the blocks to look behind: those asked for, or the ends of three thirds."""
    last = depth - 1
    if after is None:
        thirds = sorted({max(0, depth * part // 3 - 1) for part in (1, 2, 3)})
        return (last,) if last_only else tuple(thirds)
    if not all(0 <= block <= last for block in after):
        raise InputError(f"--after {show(after)}: the model's blocks are 0 to {last}")
    return after


def _columns(
    model: ViT,
    blocks: Sequence[int],
    shown: Sequence[Picture],
    views: Sequence[list[BlockView]],
    compare: bool,
) -> Iterator[list[Panel]]:
    """Draw a method's columns: a panel for every picture, shown larger than the model sees it."""
    sizes, reducer = model.config, model.reducer
    for place, block in enumerate(blocks):
        title = f"block {block}, {_span([int(view[place].tokens[0]) for view in views])} tokens"
        if compare:
            title = f"{reducer.name}\n{cost_share(sizes, reducer):.2f} x GFLOPs\n{title}"
        yield [
            Panel(title, draw_groups(picture, np.asarray(view[place].groups[0]), sizes.grid))
            for picture, view in zip(shown, views, strict=True)
        ]
    if not compare:
        title = f"{whose_attention(sizes)}, block {blocks[-1]}"
        seen = [np.asarray(view[-1].attention[0]) for view in views]
        heats = [heat_map(each, sizes.grid, shown[0].shape[:2]) for each in seen]
        yield [Panel(title, lay_over(*pair)) for pair in zip(shown, heats, strict=True)]


def _span(counts: Sequence[int]) -> str:
    """Write counts of several pictures, which may differ."""
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least} to {most}"


def _draw_figure(rows: Sequence[Sequence[Panel]], path: Path, title: str) -> None:
    """Draw rows of panels, equally long, to a file; long ones go on below all of them."""
    height, width = rows[0][0].drawing.shape[:2]
    lines = max(panel.title.count("\n") + 1 for panel in rows[0])
    count = len(rows[0])
    parts = math.ceil(count / MOST_PANELS)
    across = math.ceil(count / parts)
    cut = [row[start : start + across] for start in range(0, count, across) for row in rows]
    down = INCHES * height / width * len(cut) + TITLE_INCHES + LINE_INCHES * lines * parts
    figure, axes = pyplot().subplots(
        len(cut), across, figsize=(INCHES * across, down), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)
    figure.suptitle(title, fontsize=11)
    for place in axes.flat:
        place.axis("off")
    for index, (places, panels) in enumerate(zip(axes, cut, strict=True)):
        for place, panel in zip(places, panels, strict=False):
            place.imshow(panel.drawing, interpolation="antialiased")
            if index % len(rows) == 0:
                place.set_title(panel.title, fontsize=9)
    save_figure(figure, path, dpi=130)
