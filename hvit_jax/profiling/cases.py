"""What is measured: a model under a method, at one size and batch."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from hvit_jax.api import with_resolution
from hvit_jax.config import MODELS, ViTConfig, named_config
from hvit_jax.costs import count_flops
from hvit_jax.errors import InputError, unknown
from hvit_jax.published import (
    describe_configuration,
    find_published,
    published_rows,
    row_arguments,
)
from hvit_jax.reducers import REDUCERS, Reducer, make_reducer


@dataclass(frozen=True)
class Case:
    """One row of a report.

    Attributes:
        config: the model's sizes.
        reducer: the method, resolved for them.
        batch: images at once, for the throughput.
        published: the published results of this configuration, with the speed-up over dense that
            follows from them; or None.
    """

    config: ViTConfig
    reducer: Reducer
    batch: int
    published: dict[str, Any] | None

    def dense(self) -> Case:
        """Give the case without reduction that this one is compared with."""
        return make_case(self.config, make_reducer("dense"), self.batch)

    @property
    def gflops(self) -> float:
        """Multiply-adds of one image in the tables' convention, in billions."""
        return count_flops(self.config, self.reducer) / 1e9

    def describe(self) -> dict[str, Any]:
        """Name the case, in the form that reports have, with what needs no measuring."""
        return {
            **describe_configuration(self.config, self.reducer),
            "batch": self.batch,
            "gflops": self.gflops,
            "tokens": [layer.tokens_out for layer in self.reducer.schedule(self.config)],
            "published": self.published,
        }


def make_case(config: ViTConfig, reducer: Reducer, batch: int) -> Case:
    """Make a case, with its published results where there are any.

    Raises:
        InputError: if the method's options do not fit the model.
    """
    row = find_published(config, reducer)
    return Case(config, reducer.resolve(config), batch, _results(row) if row else None)


def published_cases(selection: str, *, batch: int) -> list[Case]:
    """List the published configurations.

    ATS and ACT get budgets for as many tokens or clusters as their published GFLOPs imply and 15 %
    more; without budgets they would save nothing.

    Args:
        selection: "all", a method, or a model.
        batch: images at once.

    Raises:
        InputError: for an unknown selection.
    """
    if selection not in ("all", *REDUCERS, *MODELS):
        raise unknown("choice of rows", selection, ("all", *REDUCERS, *MODELS))
    cases = []
    for row in published_rows():
        if selection in ("all", row["method"], row["model"]):
            config = with_resolution(named_config(row["model"]), row["resolution"])
            reducer = make_reducer(row["method"], **row_arguments(row))
            reducer = _with_implied_budget(row, reducer)
            cases.append(Case(config, reducer.resolve(config), batch, _results(row)))
    return cases


def _results(row: dict[str, Any]) -> dict[str, Any]:
    """Give a row's published results, with the speed-up over the published dense model."""
    (dense,) = (
        each["published"]["throughput"]
        for each in published_rows()
        if (each["method"], each["model"]) == ("dense", row["model"])
    )
    throughput = row["published"].get("throughput")
    return {**row["published"], "speedup": throughput and throughput / dense}


def _with_implied_budget(row: dict[str, Any], reducer: Reducer) -> Reducer:
    implied = row.get("mean_tokens_implied", row.get("mean_clusters_implied"))
    if implied is None or reducer.budget_option is None:
        return reducer
    return dataclasses.replace(reducer, **{reducer.budget_option: round(1.15 * implied)})


def sweep(cases: list[Case], text: str) -> list[Case]:
    """Repeat cases for several batch sizes.

    Args:
        cases: what to repeat.
        text: such as "batch=1,8,32".

    Raises:
        InputError: if it is not of that form.
    """
    name, _, values = text.partition("=")
    words = values.split(",")
    if name != "batch" or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"--sweep takes batch=N,N,... such as batch=1,8,32, got {text!r}")
    pairs = itertools.product(cases, map(int, words))
    return [dataclasses.replace(case, batch=batch) for case, batch in pairs]
