"""One training run, from reading the pictures to the trained checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from rich.console import Console

from hvit_jax.checkpoint import TRAINED, Description, save_checkpoint
from hvit_jax.distributed.placement import Placement, place
from hvit_jax.errors import InputError
from hvit_jax.fields import as_json
from hvit_jax.ops.precision import warn_if_slow
from hvit_jax.reducers import method_name, warn_without_budgets
from hvit_jax.system.files import remove_folder
from hvit_jax.system.memory import explain_out_of_memory
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.system.progress import plain_console
from hvit_jax.training.config import TrainConfig
from hvit_jax.training.data import augment, training_batches
from hvit_jax.training.loop import Batches, Loop
from hvit_jax.training.records import (
    METRICS,
    VALIDATION,
    MapRow,
    MetricsRow,
    Records,
    ValidationRow,
    import_tensorboard,
)
from hvit_jax.training.settings import RESULT, describe_run, open_output
from hvit_jax.training.start import begin, name_method_before, open_data
from hvit_jax.training.states import StateFolder
from hvit_jax.training.trainer import Trainer, make_optimizer
from hvit_jax.training.validation import Validate, make_validate


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        checkpoint: the folder of the trained model, for `hvit_jax.load`.
        steps: steps in all.
        metrics: the last row of metrics.csv.
        validation: the last row of validation.csv, if there was a validation.
    """

    checkpoint: Path
    steps: int
    metrics: MetricsRow
    validation: ValidationRow | MapRow | None


def train(
    config: TrainConfig,
    *,
    console: Console | None = None,
    batches: Callable[..., Batches] = training_batches,
    make_validate: Callable[..., Validate] = make_validate,
) -> TrainResult:
    """Train, and write the trained model to OUTPUT/checkpoint.

    In several processes, all of them call this.

    A finished run stays as it is, and its result is given again.

    Args:
        config: what to train, and how.
        console: where process 0 reports to; default: stdout.
        batches: makes the training batches; see `training_batches`.
        make_validate: makes what validates; see `make_validate`.

    Raises:
        InputError: for anything wrong with the data, the start, or the output folder.
        KeyboardInterrupt: after Ctrl-C, and `Stopped` after SIGTERM, once the state is saved; a
            second one does not wait for that.
    """
    if config.tensorboard:
        import_tensorboard()  # Its lack is found before anything is computed.
    use_compilation_cache(config.cache)
    console = console or plain_console(quiet=jax.process_index() > 0)
    output, placement = config.output, place(shard=config.shard_parameters)
    config.check_devices(placement.devices)
    data = open_data(config)
    pictures, held_out = data.pictures, data.held_out
    begun, parameters, note = begin(config, data.classes)
    trainer = _trainer(config, begun, len(pictures), placement)
    settings = describe_run(as_json(config), config.checkpoint, trainer, pictures, held_out)
    settings = open_output(output, settings, resume=config.resume)
    checkpoint, steps = output / RESULT, config.steps(len(pictures))
    row = MapRow if config.task == "segmentation" else ValidationRow
    if checkpoint.exists():
        console.print(f"{output} is finished: {checkpoint} is its result")
        last = Records(output, steps, row).last
        return TrainResult(checkpoint, steps, last[METRICS], last[VALIDATION])
    notes = [*data.notes, *([note] if note else []), *name_method_before(config)]
    for each in notes:
        console.print(each)
    warn_if_slow(config.compute.dtype, console.print)
    warn_without_budgets(trainer.reducer, begun.config, console.print)
    validate = None
    if held_out is not None:
        validate = make_validate(trainer, held_out, data.classes, config)
    states, advice = StateFolder(output / "state"), config.less_memory(placement.devices)
    with explain_out_of_memory(config.batch_size, advice), _ended(states, output, placement):
        teacher = placement.shard_state(trainer.teacher(parameters))
        state = placement.shard_state(trainer.init(parameters))
        del parameters  # They may take gigabytes.
        if config.resume:
            state = states.newest(state, note=console.print) or state
        first = int(state.step)
        records = Records(output, first, row, tensorboard=config.tensorboard)
        loop = Loop(trainer, states, records, console, validate, config, len(pictures), teacher)
        console.print(
            f"{method_name(trainer.reducer.name, trainer.reducer.options())}; "
            f"{len(pictures)} pictures, {len(data.classes)} classes; "
            f"{f'validated on {len(held_out)}; ' if held_out else ''}"
            f"{config.epochs:g} epochs of {len(pictures) / config.batch_size:.4g} steps: {steps} "
            f"steps of {config.batch_size} from step {first} on "
            f"{placement.devices} x {jax.local_devices()[0].device_kind}"
        )
        augmented = augment(config, begun, pictures)
        options = dict(batch_size=config.batch_size, seed=config.seed, workers=config.workers)
        state = loop.run(state, batches(augmented, **options, first_step=first, note=console.print))
    trained = placement.gather(trainer.result(state))
    if jax.process_index() == 0:
        source = {"format": TRAINED, **settings}
        if begun.source:  # Whose keys hvit convert --to-torch writes.
            source["begun"] = begun.source
        del source["model"]  # The description has the sizes.
        save_checkpoint(checkpoint, trained, dataclasses.replace(begun, source=source))
        console.print(f"written: {checkpoint}")
    return TrainResult(checkpoint, steps, records.last[METRICS], records.last[VALIDATION])


def _trainer(
    config: TrainConfig, begun: Description, pictures: int, placement: Placement
) -> Trainer:
    optimizer = make_optimizer(
        config.learning_rate,
        steps=config.steps(pictures),
        warmup=config.warmup_steps(pictures),
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )
    return Trainer(
        begun.config,
        config.reducer.resolve(begun.config),
        optimizer,
        placement,
        dataclasses.replace(config.compute, param_dtype="float32"),
        begun.preprocessing,
        begun.windows,
        head_only=config.train == "head",
        label_smoothing=config.label_smoothing,
        ema=config.ema,
        accumulate=config.accumulate,
        mixup=config.mixup,
        cutmix=config.cutmix,
        distill=config.distill_weight * config.distill,
        temperature=config.distill_temperature,
        seed=config.seed,
    )


@contextlib.contextmanager
def _ended(states: StateFolder, output: Path, placement: Placement) -> Iterator[None]:
    """Close the states of a run that ends early; without any, give the name of its folder free."""
    try:
        yield
    except BaseException as error:
        try:
            if placement.processes == 1:  # With others it may wait for one that is gone.
                states.close()
        except InputError:
            # What came first is to be reported; but a stop promises that its state is saved.
            if isinstance(error, KeyboardInterrupt):
                raise
        finally:
            saved = states.saved()
            if jax.process_index() == 0 and not saved:
                remove_folder(output, still_written=True)
        if not isinstance(error, KeyboardInterrupt) or error.args:
            raise
        rest = "--resume continues from the newest saved state" if saved else "nothing was saved"
        raise type(error)(f"interrupted; {rest}") from error
