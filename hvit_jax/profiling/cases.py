"""What is measured: a model under a method, at one size and batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvit_jax.api import with_resolution
from hvit_jax.architectures import MODELS, named_config
from hvit_jax.config import ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.errors import unknown
from hvit_jax.models.reducer import Reducer
from hvit_jax.profiling.results import Measurement
from hvit_jax.published import describe_configuration, find_published, published_rows
from hvit_jax.reducers import REDUCERS, Budgeted, make_reducer
from hvit_jax.segmenter import row_gflops, segmenter_config, segmenter_method, segmenter_rows

SEGMENTER = "segmenter"


@dataclass(frozen=True)
class Case:
    """One row of a report."""

    config: ViTConfig
    reducer: Reducer  # Resolved for the model.
    batch: int  # Images at once, for the throughput.
    published: dict[str, Any] | None  # Its published results, with the speed-up over dense.
    table_gflops: float | None = None  # GFLOPs as the Segmenter tables count them.

    @property
    def gflops(self) -> float:
        """Multiply-adds of one image in the tables' convention, in billions."""
        return count_flops(self.config, self.reducer) / 1e9

    def row(self, dtype: str | None = None) -> Measurement:
        """Give the case's row with what needs no measuring; `dtype` is what it will run in."""
        return Measurement(
            **describe_configuration(self.config, self.reducer),
            batch=self.batch,
            dtype=dtype,
            gflops=self.gflops,
            table_gflops=self.table_gflops,
            tokens=[layer.tokens_out for layer in self.reducer.schedule(self.config)],
            published=self.published,
        )


def make_case(config: ViTConfig, reducer: Reducer, batch: int) -> Case:
    """Make a case, with its published results where there are any.

    Raises:
        InputError: if the method's options do not fit the model.
    """
    row = find_published(config, reducer)
    published = _results(row, published_rows(), "model") if row else None
    return Case(config, reducer.resolve(config), batch, published)


def published_cases(selection: str, *, batch: int) -> list[Case]:
    """List the published configurations: all of classification, or those of a method or a model.

    `segmenter` lists those of segmentation.

    ATS and ACT get budgets for as many tokens or clusters as their published GFLOPs imply and 15 %
    more; without budgets they would save nothing.

    Raises:
        InputError: for an unknown selection.
    """
    if selection not in ("all", SEGMENTER, *REDUCERS, *MODELS):
        raise unknown("choice of rows", selection, ("all", SEGMENTER, *REDUCERS, *MODELS))
    if selection == SEGMENTER:
        return [_segmenter_case(row, batch) for row in segmenter_rows()]
    cases = []
    for row in published_rows():
        if selection in ("all", row["method"], row["model"]):
            config = with_resolution(named_config(row["model"]), tuple(row["resolution"]))
            reducer = make_reducer(row["method"], **row["args"])
            implied = row.get("mean_tokens_implied", row.get("mean_clusters_implied"))
            if isinstance(reducer, Budgeted) and implied is not None:
                reducer = reducer.with_budgets(round(1.15 * implied))
            published = _results(row, published_rows(), "model")
            cases.append(Case(config, reducer.resolve(config), batch, published))
    return cases


def _segmenter_case(row: dict[str, Any], batch: int) -> Case:
    """Make the case of a window of a published Segmenter."""
    config, reducer = segmenter_config(row["dataset"]), segmenter_method(row)
    published = {**_results(row, segmenter_rows(), "dataset"), "data_set": row["dataset"]}
    if "gflops_note" in row:
        published["note"] = row["gflops_note"]
    return Case(config, reducer.resolve(config), batch, published, row_gflops(row))


def _results(row: dict[str, Any], rows: Sequence[dict[str, Any]], of: str) -> dict[str, Any]:
    """Give a row's published results, with the speed-up over the dense row of the same `of`."""
    (dense,) = (
        each["published"]["throughput"]
        for each in rows
        if (each["method"], each[of]) == ("dense", row[of])
    )
    throughput = row["published"].get("throughput")
    return {**row["published"], "speedup": throughput and throughput / dense}


def with_dense(cases: Sequence[Case]) -> list[Case]:
    """Put the dense model before the first case of its size and batch, unless it is listed."""
    listed = {(case.config, case.batch) for case in cases if case.reducer.name == "dense"}
    found = []
    for case in cases:
        if (case.config, case.batch) not in listed:
            listed.add((case.config, case.batch))
            found.append(make_case(case.config, Reducer(), case.batch))
        found.append(case)
    return found
