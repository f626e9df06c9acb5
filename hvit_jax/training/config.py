"""What a training run is asked to do: the options of `hvit train`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax.api import with_resolution
from hvit_jax.architectures import named_config
from hvit_jax.config import WITHOUT_FLOAT8, Compute, ViTConfig
from hvit_jax.dense.config import LabelTruth
from hvit_jax.distributed.processes import Processes
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, flag, given, nested, option, show
from hvit_jax.models.reducer import Reducer
from hvit_jax.pictures import Preparing, Windows
from hvit_jax.system.programs import CACHE_HELP
from hvit_jax.training.augment import STRENGTHS

SIZES = ("patch_size", "depth", "width", "heads", "mlp_width")
_start = functools.partial(option, group="model: from a checkpoint, a name, or sizes")
_size = functools.partial(_start, None, "for a model of your own")
_map = functools.partial(option, group="with --task segmentation")
_recipe = functools.partial(option, group="recipe")
_running = functools.partial(option, group="running")
# What has an effect for one task alone.
_OF_TASK = {
    "classification": {
        *("crop_scale", "rand_augment", "mixup", "cutmix", "crop_pct", "interpolation"),
    },
    "segmentation": {
        *("decoder", "scale_range"),
        *(field.name for kind in (LabelTruth, Windows) for field in dataclasses.fields(kind)),
    }
    - {"exif"},
}


@dataclass(frozen=True)
class TrainConfig(Options):
    """A training run, for `train`.

    Raises:
        InputError: for values that no run can have, or that contradict each other.
    """

    data: str = option(
        help="class folders, a folder whose train/ holds them, or tfds:NAME[:SPLIT]; for "
        "segmentation ADE20K, Cityscapes, Pascal Context, or a folder of images/ and labels/",
        positional=True,
    )
    output: Path = option(help="folder for state, metrics and result", short="-o", metavar="DIR")
    resume: bool = option(False, "continue from the newest state in OUTPUT")
    task: str = option(
        "classification",
        "what is learned: the class of each picture, or of each pixel",
        choices=tuple(_OF_TASK),
    )
    reducer: Reducer = Reducer()
    preparing: Preparing = nested(Preparing)
    compute: Compute = nested(
        Compute, leave=("param_dtype", "attention", "unroll"), choices=WITHOUT_FLOAT8
    )

    checkpoint: Path | None = _start(None, "start from these weights", metavar="DIR")
    new_head: bool = _start(
        False, "with --checkpoint: start with a new, random head even if the number of classes fits"
    )
    order: bool = _start(
        False,
        "with --checkpoint: classes in their order are the head's outputs in theirs, whatever "
        "their names",
    )
    model: str | None = _start(
        None,
        "a model by its name, such as vit_b16 or vit_small_patch16_224, with random weights; "
        "hvit models lists all",
        metavar="NAME",
    )
    patch_size: int | None = _size()
    depth: int | None = _size()
    width: int | None = _size()
    heads: int | None = _size()
    mlp_width: int | None = _size()
    resolution: int | tuple[int, int] | None = _start(
        None,
        "pixels, one number or height,width (default: the checkpoint's or the name's)",
        short="-r",
    )

    decoder: str = _map(
        "linear",
        "what makes the map: one linear layer, or Segmenter's mask transformer of two blocks",
        choices=("linear", "mask"),
    )
    scale_range: tuple[float, float] = _map(
        (0.5, 2.0),
        "least and largest scale of pictures, drawn at random, before a window of the model's "
        "resolution is cut out",
        above=0,
        metavar="LEAST,MOST",
    )
    labelled: LabelTruth = nested(LabelTruth, leave=("split", "exif"))
    windows: Windows = nested(Windows, leave=("window",))

    train: str = _recipe(
        "whole",
        "what is trained: the whole model, or the head or decoder alone, which is cheap",
        choices=("whole", "head"),
    )
    batch_size: int = _recipe(
        128,
        "pictures in a step, of all devices; the learning rate belongs to it",
        short="-b",
        least=1,
    )
    epochs: float = _recipe(
        10.0, "passes over the pictures; a batch may begin in one and end in the next", above=0
    )
    warmup_epochs: float | None = _recipe(
        None,
        "linear warm-up, then cosine to 0 (default: a tenth of the epochs, at most 1)",
        least=0,
    )
    learning_rate: float = _recipe(1e-3, "highest learning rate of AdamW", above=0)
    layer_decay: float = _recipe(
        1.0, "learning rate of a layer, relative to the layer above it", least=1e-3, most=1
    )
    weight_decay: float = _recipe(
        0.05, "weight decay of weight matrices; biases and norms have none", least=0
    )
    label_smoothing: float = _recipe(
        0.1, "share of the target spread over all classes", least=0, most=0.999
    )
    crop_scale: float = _recipe(
        0.35, "smallest share of the picture's area in a random crop", least=0.001, most=1
    )
    flip: bool = _recipe(True, "random horizontal flip, probability 0.5")
    rand_augment: tuple[int, int] | None = _recipe(
        None,
        "RandAugment: operations a picture and their strength, 0 to 30, such as 2,9",
        metavar="N,STRENGTH",
    )
    mixup: float = _recipe(0.0, "alpha of mixup, such as 0.2; 0: none", least=0)
    cutmix: float = _recipe(
        0.0, "alpha of cutmix, such as 1; 0: none; with --mixup, half of the steps each", least=0
    )
    distill: bool = _recipe(
        False,
        "learn from the checkpoint's dense model too, which sees the same pictures in every step",
    )
    distill_weight: float = _recipe(
        0.5, "with --distill: its share of the loss; the labels' is the rest", above=0, most=1
    )
    distill_temperature: float = _recipe(
        1.0, "with --distill: what logits are divided by where the two are compared", above=0
    )
    ema: float = _recipe(
        0.0, "decay of the moving average that becomes the result; 0: none", least=0, most=0.999999
    )
    seed: int = _recipe(0, "seed of weights, order and augmentation", least=0, most=2**32 - 1)

    accumulate: int = _running(
        1, "parts that a batch is split into, one after the other, to save memory", least=1
    )
    on_error: str = _running(
        "stop",
        "what to do with unreadable pictures; skip names them and takes the next instead",
        choices=("stop", "skip"),
    )
    workers: int = _running(
        0,
        "processes that decode; 0: threads, which keep up where a step takes longer than decoding",
        short="-j",
        least=0,
    )
    log_every: int = _running(50, "steps between two rows of metrics.csv", least=1)
    save_every: int = _running(500, "steps between two saved states", least=1)
    shard_parameters: bool = _running(
        False, "divide parameters and optimiser among the devices, instead of a copy on each"
    )
    val: str | None = _running(
        None,
        "pictures to validate on, as for hvit eval, or none (default: val/ or alike in DATA)",
        metavar="DATA",
    )
    val_every: float = _running(1.0, "epochs between two validations", above=0)
    tensorboard: bool = _running(
        False, "also write OUTPUT/tensorboard; needs pip install 'hvit-jax[tensorboard]'"
    )
    cache: bool = _running(True, CACHE_HELP)
    processes: Processes = nested(Processes)

    def __post_init__(self):
        super().__post_init__()
        self._check_start()
        self._check_task()
        self._check_teacher()
        if self.warmup > self.epochs:
            raise InputError(
                f"--warmup-epochs {self.warmup:g} must be at most --epochs {self.epochs:g}"
            )
        operations, strength = self.rand_augment or (1, 0)
        if operations < 1 or not 0 <= strength <= STRENGTHS:
            raise InputError(
                f"--rand-augment takes at least 1 operation and a strength from 0 to {STRENGTHS}, "
                f"got {operations},{strength}"
            )
        if self.train == "head" and self.layer_decay != 1:
            raise InputError("--layer-decay has no effect with --train head; leave it out")
        if self.train == "head" and self.compute.remat:
            raise InputError("--remat saves nothing with --train head, which has no backward pass")

    def _check_start(self) -> None:
        sizes = self.sizes
        if bool(self.checkpoint) + bool(self.model) + any(sizes.values()) != 1:
            raise InputError(
                "give one of --checkpoint, --model, or the sizes of a model of your own"
            )
        if self.new_head and self.order:
            raise InputError("--new-head and --order contradict each other; give one of them")
        if (self.new_head or self.order) and not self.checkpoint:
            given = "--order" if self.order else "--new-head"
            raise InputError(f"{given} is for --checkpoint; other starts have a new head anyway")
        if any(sizes.values()):
            needed = {**sizes, "resolution": self.resolution}
            missing = [flag(name) for name, value in needed.items() if not value]
            if missing:
                raise InputError(f"a model of your own also needs {', '.join(missing)}")

    def _check_task(self) -> None:
        inner = (self, self.windows, self.preparing, self.labelled)
        changed = {name for record in inner for name in given(record)}
        for task, names in _OF_TASK.items():
            for name in sorted(names & changed if task != self.task else ()):
                raise InputError(f"{flag(name)} has no effect with --task {self.task}")
        if self.scale_range[0] > self.scale_range[1]:
            raise InputError(f"--scale-range takes the least first, got {show(self.scale_range)}")

    def _check_teacher(self) -> None:
        if not self.distill:
            for name in ("distill_weight", "distill_temperature"):
                if name in given(self):
                    raise InputError(f"{flag(name)} has no effect without --distill")
        elif not self.checkpoint or self.new_head:
            raise InputError(
                "--distill needs a --checkpoint with a trained head, whose dense model teaches"
            )
        elif type(self.reducer) is Reducer:
            raise InputError("--distill teaches a reduced model; name a method by --method")

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of a model of the user's own; all None for another start."""
        return {name: getattr(self, name) for name in SIZES}

    def new_model(self, classes: int) -> ViTConfig:
        """Give the sizes of a model that starts with random weights."""
        if self.model:
            named = with_resolution(named_config(self.model), self.resolution)
            return dataclasses.replace(named, num_classes=classes)
        own = {**self.sizes, "resolution": self.resolution}
        return ViTConfig(**own, num_classes=classes)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        default = min(1.0, self.epochs / 10)
        return default if self.warmup_epochs is None else self.warmup_epochs

    def steps(self, pictures: int) -> int:
        """Count the steps of a run on so many pictures."""
        return max(1, round(self.epochs * pictures / self.batch_size))

    def warmup_steps(self, pictures: int) -> int:
        """Count those of them in which the learning rate rises."""
        return round(self.warmup * pictures / self.batch_size)

    def check_devices(self, devices: int) -> None:
        """Refuse a batch of which some devices would get more pictures than others."""
        parts = self.accumulate * devices
        if self.batch_size % parts:
            near = max(1, round(self.batch_size / parts)) * parts
            shared = f" and {devices} devices" if devices > 1 else ""
            raise InputError(
                f"--batch-size {self.batch_size} does not divide by {parts} (--accumulate "
                f"{self.accumulate}{shared}); the nearest that does: {near}"
            )

    def less_memory(self, devices: int) -> str:
        """Name options that help where a step does not fit; the first of them changes no result."""
        size, parts = self.batch_size, self.accumulate * devices
        fits = (n for n in range(self.accumulate + 1, size + 1) if size % (n * devices) == 0)
        more, half = next(fits, 0), size // parts // 2 * parts
        helps = {
            f"--accumulate {more}": more,
            "--remat": not self.compute.remat and self.train != "head",
            "--shard-parameters": devices > 1 and not self.shard_parameters,
            f"--batch-size {half}": half,
        }
        words = [option for option, does in helps.items() if does]
        return f"try {', or '.join(words)}" if words else "a smaller --resolution needs less"
