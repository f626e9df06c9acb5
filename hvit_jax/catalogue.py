"""The models that can be made by name: what they cost, and where their weights are found."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax.architectures import (
    MODELS,
    Weights,
    architectures,
    buildable,
    named_config,
    other_cards,
    published_parameters,
    weights_of,
    why_not,
)
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option
from hvit_jax.reducers import Reducer
from hvit_jax.system.files import check_destination, write_json
from hvit_jax.system.progress import plain_console, print_table


@dataclass(frozen=True)
class ModelsConfig(Options):
    """Which models to list."""

    filter: str | None = option(
        None,
        "a part of their names, such as dinov2, or a pattern such as '*clip*_224'; a whole name "
        "lists its weights",
        metavar="FILTER",
        positional=True,
    )
    unsupported: bool = option(
        False, "list those of timm's that cannot be built instead, and what each would need"
    )
    output: Path | None = option(
        None, "write the list with all weights", short="-o", metavar="FILE.json", ends=(".json",)
    )

    def matching(self, names: Sequence[str]) -> list[str]:
        """Choose the names that the filter matches."""
        wanted = self.filter or "*"
        if wanted in names:
            return [wanted]
        pattern = wanted if set("*?[") & set(wanted) else f"*{wanted}*"
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


@dataclass(frozen=True)
class Model:
    """One line of the list.

    Attributes:
        name: as `hvit_jax.create` takes it.
        resolution: height and width in pixels.
        parameters: how many numbers it has, with the usual weights' head.
        gflops: billions of multiply-adds of one image, in the tables' convention.
        weights: those that are published, the usual ones first.
        transformers: model cards of such weights in the form of transformers.
    """

    name: str
    resolution: tuple[int, int]
    parameters: int
    gflops: float
    weights: tuple[Weights, ...]
    transformers: tuple[str, ...]


def list_models(config: ModelsConfig) -> None:
    """Print models by name, and write them to a file where that is asked for.

    Raises:
        InputError: if no name matches.
    """
    if config.output is not None:
        check_destination(config.output, overwrite=False)
    names = [name for name in architectures() if name not in buildable()]
    names = config.matching(names if config.unsupported else [*MODELS, *buildable()])
    if not names:
        raise InputError(f"no model's name matches {config.filter!r}; hvit models lists all")
    console = plain_console(file=sys.stdout)
    if config.unsupported:
        rows: list[Any] = [{"name": name, "reason": why_not(name)} for name in names]
        for row in rows:
            console.print(row["reason"])
    else:
        models = [describe(name) for name in names]
        rows = [dataclasses.asdict(model) for model in models]
        print_table(console, *_table(models))
        if len(models) == 1:
            print_table(console, *_weights(models[0]), names=2)
        if advice := _fetch(models):
            console.print(advice)
    if config.output is not None:
        write_json(config.output, {"models": rows})


def describe(name: str) -> Model:
    """Gather what is known of a model.

    Raises:
        InputError: for an unknown name, or one of a model that cannot be built.
    """
    config = named_config(name)
    return Model(
        name,
        config.image_shape,
        published_parameters(name),
        count_flops(config, Reducer()) / 1e9,
        weights_of(name),
        other_cards(name),
    )


def _table(models: Sequence[Model]) -> tuple[list[str], list[list[str]]]:
    """Write models as cells; the licence is that of the usual weights."""
    rows = []
    for model in models:
        height, width = model.resolution
        usual = model.weights[0]
        rows.append(
            [
                model.name,
                f"{height}" if height == width else f"{height}x{width}",
                f"{model.parameters / 1e6:,.1f}",
                f"{model.gflops:,.1f}",
                usual.tag if usual.found else "none",
                (usual.licence or "not stated") if usual.found else "",
            ]
        )
    return ["model", "pixels", "parameters (M)", "GFLOPs", "usual weights", "licence"], rows


def _weights(model: Model) -> tuple[list[str], list[list[str]]]:
    """Write a model's weights as cells."""
    rows = [
        [
            each.tag,
            each.found or "not published",
            str(each.classes or "no head"),
            each.licence or "",
        ]
        for each in model.weights
    ]
    rows += [["(transformers)", card, "", ""] for card in model.transformers]
    return ["weights", "found", "classes", "licence"], rows


def _fetch(models: Sequence[Model]) -> str | None:
    """Say how weights are fetched, with the first of the list as the example."""
    cards = [each.found for model in models for each in model.weights if each.found]
    card = next((card for card in cards if not card.startswith("http")), None)
    if card is None:
        return None
    folder = card.partition("/")[2]
    return (
        "GFLOPs: billions of multiply-adds an image. Weights: timm/MODEL.WEIGHTS, such as\n"
        f"  hf download {card} --local-dir {folder}\n"
        f"  hvit convert {folder} {folder}.jax"
    )
