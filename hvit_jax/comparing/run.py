"""A comparison from beginning to end: settings, of which some may fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hvit_jax.checkpoint import read_description, trained_with
from hvit_jax.comparing.config import CompareConfig
from hvit_jax.comparing.opening import Opened, open_comparison
from hvit_jax.comparing.page import write_page
from hvit_jax.comparing.report import (
    at_levels,
    commands,
    conclusion,
    failures,
    machine,
    result,
    table,
    unsteady,
)
from hvit_jax.comparing.rows import Comparison, Goal, Trial, choose, csv_table, rivals
from hvit_jax.comparing.settings import Chosen, Setting, choose_settings
from hvit_jax.comparing.trials import Trials
from hvit_jax.data.picture import PictureError
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.errors import InputError
from hvit_jax.models.reducer import Reducer
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.profiling.results import Results
from hvit_jax.profiling.run import FAILURES, describe_failure
from hvit_jax.reducers import warn_without_budgets
from hvit_jax.system.figures import check_plot
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console, print_table, show_progress
from hvit_jax.system.signals import sigterm_raises

PROGRAM = "hvit compare"
# Options that numbers depend on.
SETTINGS = ("data", "checkpoint", "resolution", "preparing", "labelling", "unlabelled")
SETTINGS += ("classifying", "truth", "depth", "windows", "restore", "batch_size", "seconds")
SETTINGS += ("compute",)


def compare(
    config: CompareConfig,
    *,
    settings: Sequence[Setting] | None = None,
    console: Console | None = None,
    messages: Console | None = None,
    bench: Callable[..., Trials] = Trials,
) -> Comparison:
    """Compare methods on a sample of the pictures; print the settings, and the one to use.

    Args:
        config: what to compare, and how.
        settings: what to try beside dense; default: what `config` asks for.
        console: where the result is printed; default: stdout.
        messages: where progress goes; default: stderr.
        bench: makes what tries settings, as `Trials` does.

    Raises:
        InputError: for anything in the configuration that is wrong, a picture that cannot be read,
            or a dense model that fails.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM; what was finished is in the
            file.
    """
    console = console or plain_console()
    messages = messages or plain_console(stderr=True)
    refuse_several(PROGRAM)
    opened = open_comparison(config, messages)
    chosen = _choose(config, opened, settings)
    use_compilation_cache(config.cache)
    results, pages = _open_files(config, opened)
    _announce(config, opened, chosen, messages)
    trials = bench(opened.bench, config.seconds)
    done = Comparison(len(opened.pictures), left_out=chosen.left_out)
    try:
        with sigterm_raises():
            _try_all(chosen.settings, trials, results, done, messages)
    except KeyboardInterrupt as stop:
        kept = "are kept; --resume continues" if config.output else "are lost without --output"
        message = f"interrupted; {len(done.rows)} finished settings {kept}"
        raise type(stop)(message) from stop
    goal = Goal(config.target_speedup, config.max_drop).of(done.rows[0])
    done.chosen, done.reached = choose(done.rows, goal)
    if done.chosen is not None:
        done.rivals = rivals(done.rows, done.chosen)
    _print(console, done, config, opened, goal)
    for path in pages:
        write_page(path, done, goal, config, opened, messages)
        console.print(f"written: {path}")
    return done


def _open_files(config: CompareConfig, opened: Opened) -> tuple[Results[Trial], list[Path]]:
    """Open the files that rows go to, and check that the reports can be written."""
    pages = [path for path in config.output if path.suffix.lower() == ".html"]
    for path in pages:
        check_plot(path, "--output FILE.html")
    options = {"settings": SETTINGS, "resume": config.resume, "tables": {".csv": csv_table}}
    files = [path for path in config.output if path not in pages]
    return Results(files, Trial, config, opened.about, **options), pages


def _announce(config: CompareConfig, opened: Opened, chosen: Chosen, messages: Console) -> None:
    """Say where the comparison runs, on what, and what a user should know beforehand."""
    if (method := trained_with(read_description(config.inputs[1]))) is not None:
        messages.print(f"trained with {method}; changes are counted from the dense model")
    warn_if_slow(config.compute.dtype, messages.print)
    where, pictures = machine(opened.about), len(opened.pictures)
    messages.print(f"{where}, {pictures} pictures, {len(chosen.settings)} settings")
    for each in chosen.settings:
        if each.percentile is None:  # Else budgets are measured.
            warn_without_budgets(each.reducer, opened.bench.sizes, messages.print)


def _choose(config: CompareConfig, opened: Opened, settings: Sequence[Setting] | None) -> Chosen:
    sizes = opened.bench.sizes
    methods = config.methods if settings is None else ()
    found = choose_settings(sizes, methods, config.levels, candidates=config.candidates)
    if settings is None:
        return found
    own = [replace(each, reducer=each.reducer.resolve(sizes)) for each in settings]
    return Chosen((found.settings[0], *own), {})


def _try_all(
    settings: Sequence[Setting],
    trials: Trials,
    results: Results[Trial],
    done: Comparison,
    messages: Console,
) -> None:
    """Try the settings that are not finished yet, the dense model first.

    An interrupt leaves in `done` what was tried before.
    """
    count = len(settings)
    with show_progress(messages, count, unit="settings") as show:
        for number, setting in enumerate(settings, 1):
            row, source = results.find(trials.row(setting)), " (from --output)"
            if row is None:
                row, source = _try(setting, trials), ""
                results.add(row)
            messages.print(f"{number}/{count} {result(row)}{source}")
            if row.method == Reducer.name and row.error is not None:
                raise InputError(
                    f"the dense model, which all others are compared with, failed: {row.error}"
                )
            done.rows.append(row)
            show(number, row.name)


def _try(setting: Setting, trials: Trials) -> Trial:
    """Measure one setting, which may fail; a picture that cannot be read is no fault of its."""
    try:
        return trials.measure(setting)
    except PictureError:
        raise
    except FAILURES as error:
        failure = describe_failure(error, trials.bench.batch)
        return replace(trials.row(setting), error=failure)


def _print(
    console: Console, done: Comparison, config: CompareConfig, opened: Opened, goal: Goal
) -> None:
    """Print the table, what it says, and the setting to use."""
    head, *cells = table(done.rows, opened.unit)
    print_table(console, head, cells, names=2)
    lines = [*failures(done), *unsteady(done.rows), *at_levels(done.rows, config.levels)]
    lines += ["", *conclusion(done, goal)]
    if done.chosen is not None:
        lines += ["", *commands(done.chosen, config, opened.bench)]
    console.print("\n".join(lines))
