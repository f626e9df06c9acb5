"""Calibration from beginning to end: checks, counts, proposed budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from hvit_jax.calibration.budgets import BlockCounts, measure, propose
from hvit_jax.calibration.config import OTHERWISE, CalibrateConfig
from hvit_jax.checkpoint import (
    choose_method,
    describe_checkpoint,
    fitted_parameters,
    read_description,
)
from hvit_jax.config import ViTConfig
from hvit_jax.costs import count_flops
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.loader import Batch, load_batches
from hvit_jax.data.source import SAMPLING, open_source, take_evenly
from hvit_jax.distributed.placement import place
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError
from hvit_jax.fields import as_json, flag, show
from hvit_jax.models.parameters import build_model
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.published import describe_configuration
from hvit_jax.reducers import Budgeted, as_budgeted
from hvit_jax.system.files import check_writable, new_file, refuse_existing, write_json
from hvit_jax.system.memory import explain_out_of_memory, smaller_batch
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, print_table
from hvit_jax.system.provenance import describe_runtime


@dataclass(frozen=True)
class Calibration:
    """What a calibration found."""

    reducer: Budgeted  # The method with the proposed budgets, resolved.
    counts: list[BlockCounts]  # What its blocks needed.
    measured: dict[str, Any]  # The counts in short and what they depend on, as the file has it.


def calibrate(
    config: CalibrateConfig,
    *,
    console: Console | None = None,
    messages: Console | None = None,
    load: Callable[..., AbstractContextManager[Iterator[Batch]]] = load_batches,
) -> Calibration:
    """Measure what a method with budgets needs on pictures, and print what it should have.

    Args:
        config: what to measure, and how.
        console: where the result is printed; default: stdout.
        messages: where progress is shown; default: stderr.
        load: starts to decode the pictures.

    Raises:
        InputError: for anything in the configuration that is wrong.
    """
    refuse_several("hvit calibrate")
    if config.output is not None:
        refuse_existing(config.output)
        check_writable(config.output)
    use_compilation_cache(config.cache)
    data, checkpoint = config.inputs
    description = read_description(checkpoint).at(config.resolution)
    sizes = description.config
    preprocessing = config.preparing.changed(description.preprocessing)
    messages = messages or plain_console(stderr=True)
    free = as_budgeted(choose_method(config.reducer, description, messages.print, OTHERWISE))
    if config.reducer is None:
        free = free.with_budgets(None)  # Those that the checkpoint was trained with do not count.
    _check(free, sizes)
    pictures = open_source(data, exif=config.preparing.exif, labelled=None)
    placement = place()
    part = take_evenly(pictures, config.batches * config.batch_size)
    model = build_model(sizes, free, fitted_parameters(checkpoint, sizes), config.compute)
    size = placement.round_up(min(config.batch_size, len(part)))
    for note in pictures.notes:
        messages.print(note)
    warn_if_slow(config.compute.dtype, messages.print)
    loading = load(
        part,
        sizes.image_shape,
        batch_size=size,
        workers=config.workers,
        preprocessing=preprocessing,
    )
    with (
        loading as batches,
        explain_out_of_memory(size, smaller_batch(size, placement.devices)),
    ):
        total, hidden = -(-len(part) // size), not messages.is_terminal
        shown = track(batches, "measuring", total, console=messages, disable=hidden)
        counts = measure(
            model, shown, batch_size=size, placement=placement, preprocessing=preprocessing
        )
    reducer = propose(free, sizes, counts, percentile=config.percentile, common=config.common)
    measured = {
        **describe_runtime(placement.devices),
        "config": as_json(config),
        **describe_checkpoint(checkpoint),
        "data_sha256": data_sha256(pictures),
        "preprocessing": as_json(preprocessing),
        "sampling": SAMPLING,
        **describe_configuration(sizes, model.reducer),
        "pictures": len(part),
        "blocks": [entry.summary(config.percentile) for entry in counts],
    }
    console = console or plain_console()
    _print(console, config.percentile, sizes, free, reducer, measured)
    if config.output is not None:
        content = {"method": reducer.name, "args": reducer.options(), "measured": measured}
        with new_file(config.output) as temporary:
            write_json(temporary, content)
        console.print(f"written: {config.output}")
    return Calibration(reducer, counts, measured)


def _check(reducer: Budgeted, sizes: ViTConfig) -> None:
    """Find mistakes before the work starts."""
    # Any budgets will do to see whether the other options leave room for them.
    reducer.with_budgets(max(2, sizes.prefix_tokens + 1)).resolve(sizes)
    if getattr(reducer, reducer.budget_option) is not None:
        name = flag(reducer.budget_option)
        raise InputError(f"{name} is what this command measures; leave it out")
    if not reducer.resolve(sizes).budget_blocks(sizes):
        raise InputError(f"{reducer.name} has nothing to measure with these options")


def _print(
    console: Console,
    percentile: float,
    sizes: ViTConfig,
    free: Budgeted,
    reducer: Budgeted,
    measured: dict[str, Any],
) -> None:
    """Print the counts and the proposed budgets."""
    option = reducer.budget_option
    listed = reducer.options()[option]
    budgets = dict(zip(reducer.budget_blocks(sizes), listed, strict=True))
    size, share = "x".join(map(str, sizes.image_shape)), f"{percentile:g} % need"
    before, after = (count_flops(sizes, each) / 1e9 for each in (free, reducer))
    console.print(
        f"{reducer.name} on {measured['pictures']} pictures, {measured['model']} at {size}"
    )
    rows = [
        (
            *(str(row["block"]), str(row["counted"])),
            *(f"{row['mean']:.1f}", f"{row['median']:.1f}"),
            *(str(row["percentile"]), str(row["max"]), str(budgets[row["block"]])),
        )
        for row in measured["blocks"]
    ]
    print_table(console, ("block", "counted", "mean", "median", share, "max", "budget"), rows)
    console.print(
        f"GFLOPs a picture (tables' convention): {before:.3f} without budgets, {after:.3f} with\n"
        f"use: {flag(option)} {show(listed)}"
    )
