"""What `hvit profile` is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hvit_jax.api import with_resolution
from hvit_jax.architectures import named_config
from hvit_jax.checkpoint import read_description
from hvit_jax.config import IN_COMMANDS, Compute, ViTConfig
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, flag, nested, option
from hvit_jax.reducers import Reducer, method_of_checkpoint
from hvit_jax.system.figures import FORMATS
from hvit_jax.system.programs import CACHE_HELP

DEFAULT_MODEL = "vit_b16"


@dataclass(frozen=True)
class ProfileConfig(Options):
    """What to profile, and how; `hvit profile --help` explains every field."""

    reducer: Reducer | None = method_of_checkpoint()
    model: str | None = option(
        None,
        "a model by its name, such as vit_base_patch14_dinov2; hvit models lists all (default: "
        f"{DEFAULT_MODEL})",
        metavar="NAME",
    )
    checkpoint: Path | None = option(
        None, "a folder written by hvit convert or by training", metavar="DIR"
    )
    resolution: int | tuple[int, int] | None = option(
        None,
        "picture size in pixels, one number or height,width (default: the model's)",
        short="-r",
        metavar="N[,N]",
    )
    batch_size: int = option(
        8, "pictures at once; few, so that a large model runs on any machine", short="-b", least=1
    )
    rows: str | None = option(
        None,
        "the published rows: all, or those of a method, a model or segmenter; ATS and ACT with the "
        "budgets that their published GFLOPs imply",
        metavar="all|METHOD|MODEL|segmenter",
    )
    sweep: str | None = option(None, "measure several batch sizes", metavar="batch=N,N")
    compute: Compute = nested(Compute, leave=("param_dtype", "remat"), choices=IN_COMMANDS)
    gflops_only: bool = option(False, "print GFLOPs, without running a model")
    against: str | None = option(
        None,
        "time a rival's dense model on the same weights in the same run too: torch is SWAG's ViT "
        "of PyTorch's own layers, timm the class of timm, each eager and compiled; onnxruntime "
        "the exported model, on a CPU",
        choices=("torch", "timm", "onnxruntime"),
    )
    dense: bool = option(True, "time the dense model beside the method")
    latency: bool = option(True, "time single pictures")
    seconds: float = option(
        1.0, "length of each of the five rounds of timing, about", above=0, most=3600, metavar="S"
    )
    cache: bool = option(True, CACHE_HELP)
    output: tuple[Path, ...] = option(
        (),
        "write the results after every row: .json, .csv or .md; may be repeated",
        short="-o",
        metavar="FILE",
        ends=(".json", ".csv", ".md"),
    )
    resume: bool = option(False, "continue with the rows of --output FILE.json")
    plot: Path | None = option(
        None, "draw top-1 against throughput", metavar="FILE.png", ends=FORMATS
    )
    accuracy: tuple[Path, ...] = option(
        (),
        "draw the top-1 of results that hvit eval --output wrote (default: the published)",
        metavar="RESULTS.json[,...]",
    )
    trace: Path | None = option(
        None, "write a profiler trace of three forward passes", metavar="DIR"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is not None and self.model is not None:
            raise InputError("give --model NAME or --checkpoint DIR, not both")
        if self.accuracy and self.plot is None:
            raise InputError("--accuracy goes with --plot FILE.png")
        if self.rows is not None:
            names = ("model", "checkpoint", "resolution", "trace")
            self._refuse("--rows brings its own configurations", names)
            if self.reducer is not None and self.reducer.name != "dense":
                raise InputError("--rows brings its own configurations; leave out --method")
        if self.gflops_only:
            names = ("trace", "plot", "against", "sweep")
            self._refuse("--gflops-only measures nothing", names)
        sizes = r"batch=[1-9]\d*(,[1-9]\d*)*"
        if self.sweep is not None and not re.fullmatch(sizes, self.sweep):
            raise InputError(
                f"--sweep takes batch=N,N,... such as batch=1,8,32, got {self.sweep!r}"
            )

    @property
    def sizes(self) -> ViTConfig:
        """The sizes of the model, where no published rows are asked for."""
        if self.checkpoint is not None:
            model = read_description(self.checkpoint).config
        else:
            model = named_config(self.model or DEFAULT_MODEL)
        try:
            return with_resolution(model, self.resolution)
        except InputError as error:
            raise InputError(f"--resolution: {error}") from error

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes to measure at."""
        if self.sweep is None:
            return (self.batch_size,)
        return tuple(map(int, self.sweep.removeprefix("batch=").split(",")))

    def _refuse(self, reason: str, names: tuple[str, ...]) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise InputError(f"{reason}; leave out {flag(name)}")
