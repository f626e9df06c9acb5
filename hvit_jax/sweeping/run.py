"""A sweep from beginning to end: candidates, of which some may fail and some are not worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from hvit_jax.checkpoint import describe_checkpoint, read_description, trained_with
from hvit_jax.costs import count_flops
from hvit_jax.data.fingerprint import data_sha256
from hvit_jax.data.source import SAMPLING, take_evenly
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError
from hvit_jax.evaluation import EvalConfig
from hvit_jax.evaluation.inputs import Inputs, open_inputs
from hvit_jax.evaluation.probing import Training
from hvit_jax.evaluation.step import Scoring
from hvit_jax.evaluation.tally import Tally
from hvit_jax.fields import as_json
from hvit_jax.models.reducer import Reducer
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.profiling.device import describe_device
from hvit_jax.profiling.results import Results
from hvit_jax.profiling.run import FAILURES, describe_failure
from hvit_jax.reducers import warn_without_budgets
from hvit_jax.sweeping.choice import (
    Candidate,
    Goal,
    Skipped,
    Sweep,
    Trial,
    candidates,
    choose,
)
from hvit_jax.sweeping.config import SweepConfig
from hvit_jax.sweeping.report import plot_sweep, report, result, table
from hvit_jax.sweeping.trials import Trials, load_sample
from hvit_jax.system.figures import check_plot
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, print_table
from hvit_jax.system.signals import sigterm_raises

# Options that numbers depend on.
SETTINGS = ("data", "checkpoint", "resolution", "preparing", "labelling", "classifying")
SETTINGS += ("batch_size", "seconds", "compute")


def sweep(
    config: SweepConfig,
    *,
    settings: Sequence[Candidate] | None = None,
    console: Console | None = None,
    messages: Console | None = None,
    bench: Callable[..., Trials] = Trials,
) -> Sweep:
    """Try settings on a sample of the pictures; print the front and the setting to use.

    Args:
        config: what to try, and how.
        settings: what to try beside dense; default: what each of the methods proposes.
        console: where the result is printed; default: stdout.
        messages: where progress goes; default: stderr.
        bench: makes what tries them, as `Trials` does.

    Raises:
        InputError: for anything in the configuration that is wrong, a picture that cannot be read,
            or a dense model that fails.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM; what was finished is in the
            file.
    """
    console = console or plain_console()
    messages = messages or plain_console(stderr=True)
    refuse_several("hvit sweep")
    if config.plot is not None:
        check_plot(config.plot, "--plot")
    data, checkpoint = config.inputs
    inputs = open_inputs(
        data,
        checkpoint,
        config.resolution,
        Reducer(),
        messages.print,
        preparing=config.preparing,
        labelling=config.labelling,
        classifying=config.classifying,
    )
    if (method := trained_with(read_description(checkpoint))) is not None:
        messages.print(f"trained with {method}; drops are counted from the dense model")
    sizes, labelled, preprocessing = inputs.sizes, inputs.labelled, inputs.preprocessing
    source = inputs.source
    placement = place()
    found = candidates(sizes, config.methods if settings is None else ())
    found += [replace(each, reducer=each.reducer.resolve(sizes)) for each in settings or ()]
    warn_if_slow(config.compute.dtype, messages.print)
    use_compilation_cache(config.cache)
    # At even distances over the data, and so over its classes.
    part = take_evenly(source, config.pictures)
    device = describe_device(placement.devices)
    about = {
        **device,
        "pictures": len(part),
        "sampling": SAMPLING,
        "data_sha256": data_sha256(source),
        **inputs.describe_classifying(),
        **labelled.describe(),
        "preprocessing": as_json(preprocessing),
        **describe_checkpoint(checkpoint),
    }
    paths = [] if config.output is None else [config.output]
    results = Results(paths, Trial, config, about, settings=SETTINGS, resume=config.resume)
    messages.print(f"{_machine(device)}, {len(part)} pictures, {len(found)} candidates")
    for each in found:
        if each.percentile is None:  # Else the sweep measures its budgets.
            warn_without_budgets(each.reducer, sizes, messages.print)
    # A whole batch is divided among the devices, as hvit eval does it.
    size = placement.round_up(min(config.batch_size, len(part)))
    batches = load_sample(
        part,
        sizes.image_shape,
        batch_size=size,
        workers=config.workers,
        messages=messages,
        preprocessing=preprocessing,
    )
    labels = labelled.right[list(part.indices)]
    trials = bench(
        sizes,
        inputs.weights(),
        config.compute,
        batches,
        labels,
        _scoring(inputs, config, placement, messages),
        placement,
        config.seconds,
    )
    goal, done = config.goal, Sweep()
    try:
        with sigterm_raises():
            _try_all(found, trials, None if config.all else goal, results, done, messages)
    except KeyboardInterrupt as stop:
        kept = "are kept; --resume continues" if config.output else "are lost without --output"
        message = f"interrupted; {len(done.rows)} finished candidates {kept}"
        raise type(stop)(message) from stop
    if goal is not None:
        done.chosen, done.reached = choose(done.rows, goal)
    evaluation = EvalConfig(
        data=config.data,
        checkpoint=config.checkpoint,
        resolution=config.resolution,
        preparing=config.preparing,
        labelling=config.labelling,
        classifying=config.classifying,
        compute=config.compute,
        batch_size=config.batch_size,
    )
    head, *cells = table(done.rows, done.chosen)
    print_table(console, head, cells, names=2)
    console.print("\n".join(report(done, goal, evaluation)))
    if config.plot is not None:
        plot_sweep(done.rows, done.chosen, goal, config.plot)
        console.print(f"written: {config.plot}")
    return done


def _scoring(
    inputs: Inputs, config: SweepConfig, placement: Placement, messages: Console
) -> Scoring:
    """Say how all candidates are scored; a probe is trained on the dense model's features."""
    if inputs.training is None:
        return inputs.scoring
    model = inputs.model(config.compute)
    training = Training(inputs, model, placement, config.batch_size, config.workers, messages)
    head, _ = training.learn(Tally(keep_logits=True))
    return replace(inputs.scoring, head=head)


def _machine(device: dict[str, Any]) -> str:
    many = f"{device['devices']} x " if device["devices"] > 1 else ""
    return f"{many}{device['device']} ({device['processor']}, {device['cpus']} cores)"


def _try_all(
    found: Sequence[Candidate],
    trials: Trials,
    goal: Goal | None,
    results: Results[Trial],
    done: Sweep,
    messages: Console,
) -> None:
    """Try the candidates that are not finished yet, the dense model first.

    Where the goal makes all of them hopeless, the one with fewest GFLOPs is tried nevertheless, so
    that there is a nearest one to name. An interrupt leaves in `done` what was tried before.
    """

    def run(candidate: Candidate, goal: Goal | None, label: str) -> None:
        row, source = results.find(trials.row(candidate, candidate.reducer)), " (from --output)"
        if row is None:
            row, source = _try(candidate, trials, goal), ""
            if isinstance(row, Skipped):
                done.skipped.append(row)
                return
            results.add(row)
        messages.print(f"{label} {result(row)}{source}")
        if row.method == "dense":
            if row.error is not None:
                raise InputError(
                    f"the dense model, which all others are compared with, failed: {row.error}"
                )
            trials.dense_correct = np.array([right == "1" for right in row.correct or ""])
        done.rows.append(row)

    shown = track(found, "trying", console=messages, disable=not messages.is_terminal)
    for number, candidate in enumerate(shown, 1):
        run(candidate, goal, f"{number}/{len(found)}")
    if done.skipped and all(row.method == "dense" for row in done.rows):
        least = min(done.skipped, key=lambda each: each.flops)
        done.skipped.remove(least)
        run(least.candidate, None, "fewest GFLOPs:")


def _try(candidate: Candidate, trials: Trials, goal: Goal | None) -> Trial | Skipped:
    """Measure one candidate, unless it is not worth it."""
    reducer = candidate.reducer
    try:
        reducer = trials.with_budgets(candidate)
        if goal is not None and reducer.name != "dense":
            flops, dense = (count_flops(trials.sizes, each) for each in (reducer, Reducer()))
            if (reason := goal.hopeless(flops, dense)) is not None:
                return Skipped(candidate, flops, reason)
        return trials.measure(candidate, reducer)
    except FAILURES as error:
        failure = describe_failure(error, trials.batch)
        return replace(trials.row(candidate, reducer), error=failure)
