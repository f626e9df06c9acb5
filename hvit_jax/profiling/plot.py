"""Accuracy against speed as a picture, and where accuracies come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hvit_jax.errors import InputError
from hvit_jax.profiling.results import Measurement, Row, configuration_key
from hvit_jax.system.figures import new_figure, save_figure
from hvit_jax.system.files import read_json

Kind = TypeVar("Kind", bound=Row)
Accuracies = Callable[[Measurement], float | None]


def read_accuracies(files: Sequence[Path], checkpoint_sha256: str | None) -> dict[str, float]:
    """Read top-1 in per cent, by `Row.configuration`, from results that `hvit eval --output` wrote.

    The checkpoint is the one that is timed; None where weights are random, which have the speed of
    any.

    Raises:
        InputError: if a file cannot be read, is of another checkpoint, or two are of the same
            configuration, of different pictures, or classified by different means.
    """
    found, names, scored = {}, {}, None
    for path in files:
        results = read_json(path)
        try:
            key, top1 = configuration_key(results), results["top1"]
        except KeyError as error:
            raise InputError(
                f"{path} holds no results, as hvit eval --output writes them"
            ) from error
        if results.get("partial") or not isinstance(top1, int | float):
            raise InputError(f"{path} comes from an evaluation that did not finish")
        if checkpoint_sha256 not in (None, results.get("checkpoint_sha256", checkpoint_sha256)):
            raise InputError(f"{path} is for another checkpoint: {results.get('checkpoint')}")
        here = results.get("data_sha256"), results.get("classified_by", "a head")
        scored = scored or here
        if scored[0] != here[0]:
            raise InputError(f"{files[0]} and {path} were scored on different pictures")
        if scored[1] != here[1]:
            raise InputError(
                f"{files[0]} and {path} were classified by different means: {scored[1]}, {here[1]}"
            )
        if key in found:
            raise InputError(f"{names[key]} and {path} are for the same configuration")
        found[key], names[key] = top1, path
    return found


def published_top1(row: Measurement) -> float | None:
    """Give the published top-1 of a row's configuration, where there is one."""
    return (row.published or {}).get("top1")


def plot(rows: Sequence[Measurement], path: Path, top1: Accuracies, kind: str) -> None:
    """Draw top-1 against measured throughput, one panel a model.

    Args:
        rows: those without either figure are left out.
        path: the file to write.
        top1: gives a row's, in per cent.
        kind: of accuracy: "published" or "measured".

    Raises:
        InputError: if no row has both figures, or the file cannot be written.
    """
    points = [row for row in rows if row.throughput and top1(row) is not None]
    if not points:
        raise InputError(f"{path} would be empty: no row has a throughput and a {kind} top-1")
    save_figure(draw_models(points, top1, kind), path)


def draw_models(rows: Sequence[Measurement], top1: Accuracies, kind: str) -> Any:
    """Draw rows that have both figures; gives matplotlib's figure. See `plot`."""
    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = new_figure(len(models))
    for panel, model in zip(panels, models, strict=True):
        here = [row for row in rows if row.model == model]
        draw_methods(panel, here, lambda row: (row.throughput or 0.0, top1(row) or 0.0))
        panel.legend()
        panel.set(title=model, xlabel="images/s, measured", ylabel=f"top-1 (%), {kind}")
    return figure


def draw_methods(
    panel: Any, rows: Sequence[Kind], place: Callable[[Kind], tuple[float, float]]
) -> None:
    """Draw rows as points, a colour for each method, and their Pareto front as a line.

    Both coordinates of a row's place are the better the larger.
    """
    for method in dict.fromkeys(row.method for row in rows):
        xs, ys = zip(*[place(row) for row in rows if row.method == method], strict=True)
        panel.plot(xs, ys, "o", label=method)
    front = pareto_front([place(row) for row in rows])
    panel.plot(*zip(*front, strict=True), "-", color="0.6", zorder=0, label="Pareto front")
    panel.grid(alpha=0.3)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Find the points that no other beats in both coordinates, from the fastest on."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front
