"""`hvit sweep`: which method and setting to use, on your pictures and device."""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track

from hvit_jax.api import with_resolution
from hvit_jax.checkpoint import Description, fitted_parameters
from hvit_jax.config import ViTConfig
from hvit_jax.data.fingerprint import fingerprints
from hvit_jax.data.loader import Batch
from hvit_jax.data.subset import SAMPLING, Subset, spread
from hvit_jax.distributed.placement import place
from hvit_jax.distributed.processes import refuse_several
from hvit_jax.evaluation.inputs import Inputs, open_inputs
from hvit_jax.profiling.device import describe_device, use_compilation_cache
from hvit_jax.profiling.record import Record
from hvit_jax.sweeping.bench import Bench
from hvit_jax.sweeping.choice import choose, front
from hvit_jax.sweeping.grid import Candidate, candidates
from hvit_jax.sweeping.options import PROGRAM, Options, parse_options
from hvit_jax.sweeping.plot import plot_sweep
from hvit_jax.sweeping.report import commands, front_table, summary
from hvit_jax.sweeping.run import NAMES, Progress, run_candidates
from hvit_jax.sweeping.sample import Sample, load_sample
from hvit_jax.system.run import run
from hvit_jax.system.signals import exit_status, sigterm_raises

NOT_REACHED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        0; 1 if no setting reaches the goal; 2 after a user's mistake; 130 or 143 where Ctrl-C or
        SIGTERM ended it.
    """
    return run(lambda: _main(sys.argv[1:] if arguments is None else arguments), PROGRAM)


def _main(arguments: Sequence[str]) -> int:
    refuse_several(arguments, "sweep")
    options, placement = parse_options(arguments), place()
    inputs = open_inputs(options.data, options.checkpoint)
    config = with_resolution(inputs.description.config, options.resolution)
    found = candidates(config, options.methods)
    messages = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if inputs.note is not None:
        messages.print(inputs.note)
    use_compilation_cache(options.cache)
    # At even distances over the data, and so over its classes.
    part = spread(inputs.source, options.pictures)
    about = _about(options, inputs, part, placement.devices)
    paths = [options.output] if options.output else []
    record = Record(paths, about, resume=options.resume, names=NAMES)
    messages.print(f"{_device(about)}, {len(part)} pictures, {len(found)} candidates")
    # As eval.py does: a whole batch is divided among the devices.
    size = placement.round_up(min(options.batch_size, len(part)))
    sample = _sample(options, part, size, inputs.description, config, messages)
    parameters = fitted_parameters(options.checkpoint, config)
    how = options.dtype, options.attention, options.seconds
    bench = Bench(config, parameters, sample, *how, placement)
    return _try_all(options, found, bench, record, messages)


def _try_all(
    options: Options, found: list[Candidate], bench: Bench, record: Record, messages: Console
) -> int:
    goal, progress = None if options.everything else options.goal, Progress()
    try:
        with sigterm_raises():
            run_candidates(found, bench, goal, record, progress, messages)
    except KeyboardInterrupt as stop:
        kept = "are kept; --resume goes on" if options.output else "are lost without --output"
        messages.print(f"interrupted; {len(progress.rows)} finished candidates {kept}")
        return exit_status(stop)
    return _finish(options, progress)


def _sample(
    options: Options,
    part: Subset,
    size: int,
    description: Description,
    config: ViTConfig,
    messages: Console,
) -> Sample:
    def show(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
        hidden = not messages.is_terminal
        return track(batches, "decoding", total, console=messages, disable=hidden)

    workers = options.workers
    return load_sample(
        part, description, config.image_shape, batch_size=size, workers=workers, show=show
    )


def _device(about: dict[str, Any]) -> str:
    many = f"{about['devices']} x " if about["devices"] > 1 else ""
    return f"{many}{about['device']} ({about['processor']}, {about['cpus']} cores)"


def _about(options: Options, inputs: Inputs, part: Subset, devices: int) -> dict[str, Any]:
    """Name what numbers depend on."""
    names = ("data", "checkpoint", "resolution", "batch_size", "dtype", "attention", "seconds")
    settings = {name: getattr(options, name) for name in names}
    return {
        **describe_device(devices),
        "settings": {**settings, "pictures": len(part), "sampling": SAMPLING},
        "checkpoint_source": inputs.description.source,
        **fingerprints(inputs.source, options.checkpoint),
    }


def _finish(options: Options, progress: Progress) -> int:
    """Print the front and the setting to use."""
    rows, goal = progress.rows, options.goal
    chosen, reached = (None, True) if goal is None else choose(rows, goal)
    print(front_table(front(rows), chosen), end="")
    reasons = collections.Counter(each.reason for each in progress.skipped)
    for reason, count in reasons.items():
        print(f"skipped {count}: {reason} (--all tries them too)")
    for row in rows:
        if row["error"] is not None:
            print(f"failed: {row['method']} {row['tried']['args']}: {row['error']}")
    if options.plot is not None:
        plot_sweep(rows, chosen, goal, options.plot)
        print(f"drawn: {options.plot}")
    if goal is None:
        print("--target-speedup X or --max-drop POINTS names the setting to use")
    elif chosen is None:
        print(f"nothing reaches {goal}: none of those tried is faster than dense here")
    else:
        what = f"to use for {goal}" if reached else f"nothing reaches {goal}; nearest"
        command, python = commands(chosen, options)
        print(f"\n{what}: {summary(chosen)}\n\n{command}\n\n{python}")
    return 0 if reached else NOT_REACHED


if __name__ == "__main__":
    sys.exit(main())
