"""One training run: everything put together, and what it leaves behind."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.data.folder import read_folder
from hvit_jax.distributed.agreement import Agreement
from hvit_jax.distributed.peers import NoPeers, Peers
from hvit_jax.distributed.placement import check_batch, place
from hvit_jax.distributed.together import check_agreement, gather
from hvit_jax.errors import InputError
from hvit_jax.models.parameters import Tree
from hvit_jax.reducers import Reducer
from hvit_jax.system.files import remove_folder
from hvit_jax.system.memory import explain_out_of_memory
from hvit_jax.system.provenance import describe_runtime
from hvit_jax.training.data import Augmentation, training_batches
from hvit_jax.training.files import StateFolder
from hvit_jax.training.loop import run_steps
from hvit_jax.training.memory import less_memory
from hvit_jax.training.parts import Run, make_reporter, summarize
from hvit_jax.training.progress import show_progress
from hvit_jax.training.records import check_tensorboard, open_records
from hvit_jax.training.settings import gather_settings, open_output, read_settings
from hvit_jax.training.start import first_parameters, make_trainer
from hvit_jax.training.trainer import Metrics, TrainState
from hvit_jax.training.validation import find_pictures


def train(
    options: argparse.Namespace, reducer: Reducer, peers: Peers | NoPeers | None = None
) -> None:
    """Train as the command line says, and write OUTPUT/checkpoint.

    Args:
        options: of `hvit train`.
        reducer: the method to train under.
        peers: the other processes of the run, if there are any.

    Raises:
        InputError: for anything wrong with the data, the start, or the output folder.
    """
    if options.tensorboard:
        check_tensorboard()
    peers = peers or NoPeers()
    placement = place(shard=options.shard_parameters)
    check_batch(options.batch_size, options.accumulate, placement.devices)
    folder = read_folder(options.data, splits=("train",))
    pictures = find_pictures(options.data, options.val, folder)
    config, parameters, note = first_parameters(options, folder.classes)
    reducer = reducer.resolve(config)
    shared = gather_settings(options, config, reducer, folder, pictures)
    check_agreement(f"{len(folder)} pictures, {shared}", resume=options.resume)
    runtime = {**describe_runtime(placement.devices), "processes": placement.processes}
    settings = {**shared, **runtime}
    output = _open_output(options, settings, peers)
    trainer, total = make_trainer(
        options, config, reducer, len(folder) / options.batch_size, placement
    )
    run = Run(options, output, folder, pictures, trainer, placement, total, peers)
    if note is not None and run.writes:
        print(note)
    advice = less_memory(options, placement.devices)
    with explain_out_of_memory(options.batch_size, advice):
        state = _train_in(run, parameters)
    result = placement.fetch(trainer.result(state))
    if run.writes:
        source = {"format": "hvit_jax.train", **read_settings(output)}
        del source["config"]
        description = Description(config, source, folder.classes)
        save_checkpoint(output / "checkpoint", result, description)
        print(f"wrote {output / 'checkpoint'}")


def _open_output(
    options: argparse.Namespace, settings: dict[str, Any], peers: Peers | NoPeers
) -> Path:
    """Let process 0 make or check the folder, which all of them share."""
    output = Path(options.output)
    if peers.index == 0:
        open_output(output, settings, resume=options.resume)
    gather(None)  # The others wait for it here.
    if not output.is_dir():
        raise InputError(f"{output} is not the folder that process 0 made; all need to see it")
    return output


def _train_in(run: Run, parameters: Tree) -> TrainState:
    """Train from the newest state in the output folder, or from the first parameters."""
    states = StateFolder(run.output / "state")
    try:
        state = run.placement.put(run.trainer.init(parameters))
        note = print if run.writes else str
        found = states.restore(state, note=note) if run.options.resume else None
        state, unread = found or (state, [])
        state = _run_steps(run, states, state, unread)
        states.close()
        return state
    except BaseException as stop:
        saved = _close(run, states, stop)
        if isinstance(stop, KeyboardInterrupt) and not stop.args:
            kept = "--resume goes on from the newest saved state" if saved else "nothing was saved"
            raise type(stop)(f"interrupted; {kept}") from stop
        raise


def _close(run: Run, states: StateFolder, stop: BaseException) -> bool:
    """Close the states of a run that ends early, and tell whether there are any."""
    try:
        if run.placement.processes == 1:  # With others it may wait for one that is gone.
            states.close()
    except InputError:
        # What came first is to be reported; but a stop promises that its state is saved.
        if isinstance(stop, KeyboardInterrupt):
            raise
    finally:
        saved = states.saved()
        if run.writes and not saved:
            _remove(run.output)  # Nothing to resume: leave the name to a corrected command.
    return saved


def _remove(output: Path) -> None:
    """Remove a folder into which threads of Orbax may write for a moment after one has failed."""
    for _ in range(5):
        remove_folder(output)
        time.sleep(0.1)


def _run_steps(
    run: Run, states: StateFolder, state: TrainState, unread: Sequence[Metrics]
) -> TrainState:
    """Train with a progress bar, from the state's step on; `unread` as for `run_steps`."""
    options, first = run.options, int(state.step)
    batches = training_batches(
        run.folder,
        Augmentation(run.trainer.config.image_shape, options.crop_scale, options.flip),
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.workers,
        first_step=first,
        process=run.peers.index,
        processes=run.placement.processes,
    )
    layout = jax.tree.map(lambda leaf: leaf.sharding, state), run.placement.replicated
    step = jax.jit(run.trainer.step, donate_argnums=0, out_shardings=layout)

    def take_step(state: TrainState, pixels: Any, labels: Any) -> Any:
        return step(state, run.placement.divide(pixels), run.placement.divide(labels))

    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=not run.writes)
    console.print(summarize(run, first))
    records = open_records(run.output, first, tensorboard=options.tensorboard)
    with show_progress(console, run.total_steps, first) as bars:
        reporter = make_reporter(run, bars, records)
        state = run_steps(
            take_step,
            state,
            batches,
            total_steps=run.total_steps,
            log_every=options.log_every,
            save_every=options.save_every,
            save=states.save,
            unread=unread,
            log=reporter.log,
            processes=run.placement.processes,
            agree=Agreement(run.placement),
            validate=reporter.validate,
        )
    records.close()
    return state
