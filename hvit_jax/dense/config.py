"""What the maps of a data set are told: the options of `hvit segment` and `hvit depth`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvit_jax.config import IN_COMMANDS, Compute
from hvit_jax.dense.folders import DATASETS, NONE
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import workers_option
from hvit_jax.fields import Options, nested, option
from hvit_jax.pictures import Windows
from hvit_jax.reducers import Reducer, method_of_checkpoint
from hvit_jax.system.programs import CACHE_HELP

_data = functools.partial(option, group="what is known of the pictures")
_FOLDER = (
    "folder of the truth, where DATA is one of pictures: files of the same names; none: there is "
    "no truth, maps are only saved"
)


def _exif_option() -> Any:
    """Declare whether pictures are turned; truth lies as its pictures are shown."""
    return _data(
        False,
        "turn pictures upright by the orientation in their EXIF data, as viewers and most tools "
        "for labelling do",
    )


@dataclass(frozen=True)
class LabelTruth(Options):
    """Where the true labels of pictures lie, and how they are read."""

    dataset: str | None = _data(
        None, "how DATA is laid out (default: what it looks like)", choices=DATASETS
    )
    truth: str | None = _data(None, _FOLDER, metavar="DIR")
    split: str = _data("val", "which part of a data set", choices=("val", "train"))
    reduce_zero_label: bool = _data(
        False,
        "in plain folders: 0 is ignored, and 1 is the first class (ADE20K is read so anyway)",
    )
    exif: bool = _exif_option()

    def __post_init__(self):
        super().__post_init__()
        known = self.dataset not in (None, "folders")
        if known and self.truth is not None:
            raise InputError(f"--dataset {self.dataset} says where the truth is; leave out --truth")
        if known and self.reduce_zero_label:
            raise InputError("--reduce-zero-label is for plain folders")


@dataclass(frozen=True)
class DepthTruth(Options):
    """Where the true depth of pictures lies, and which of it counts."""

    truth: str | None = _data(None, _FOLDER, metavar="DIR")
    split: str = _data("val", "which part of a data set", choices=("val", "train"))
    depth_scale: float = _data(
        0.001,
        "metres of one step in PNGs of 16 bits; KITTI: 0.00390625. NumPy's files hold metres",
        above=0,
    )
    depth_range: tuple[float, float] | None = _data(
        None,
        "true depth counts that lies between these, in metres (default: the head's range)",
        least=0,
    )
    exif: bool = _exif_option()

    def __post_init__(self):
        super().__post_init__()
        if self.depth_range is not None and not self.depth_range[0] < self.depth_range[1]:
            raise InputError(
                f"--depth-range takes the smaller number first, got {self.depth_range[0]:g},"
                f"{self.depth_range[1]:g}"
            )


@dataclass(frozen=True)
class MapConfig(Options):
    """What both commands are told; every field is a flag.

    Raises:
        InputError: for values that are wrong or do not go together.
    """

    data: str | None = option(
        None,
        "folder of ADE20K, Cityscapes or Pascal Context, or one with the folders images and labels "
        "(depth: images and depth)",
        positional=True,
    )
    checkpoint: Path | None = option(
        None, "a folder written by hvit convert or by training", metavar="DIR"
    )
    windows: Windows = nested(Windows)
    scales: tuple[float, ...] = option(
        (1.0,), "see pictures at several sizes, against the usual one, and average", above=0
    )
    flip: bool = option(False, "see them mirrored too, and average")
    restore: str | None = option(
        None,
        "where a method's tokens become the full grid: as masks behind the decoder, as tokens "
        "before it, or behind a block, which --reconstruct-location names (default: the "
        "checkpoint's, else the first that the method can do)",
        choices=("masks", "tokens", "block"),
    )
    compute: Compute = nested(Compute, leave=("param_dtype", "remat"), choices=IN_COMMANDS)
    batch_size: int = option(8, "windows at once, of all devices together", short="-b", least=1)
    workers: int = workers_option()
    cache: bool = option(True, CACHE_HELP)
    reducer: Reducer | None = method_of_checkpoint()
    compare_dense: bool = option(False, "map all pictures with the dense model too, and compare")
    on_error: str = option(
        "stop", "at unreadable pictures: stop, or skip and list them", choices=("stop", "skip")
    )
    output: Path | None = option(
        None, "write the results", short="-o", metavar="FILE.json", ends=(".json",)
    )
    save_maps: Path | None = option(
        None, "write the map of every picture, and the picture with it", metavar="DIR"
    )
    verify: Path | None = option(
        None,
        "repeat the run that wrote this file and compare; exit status 1 if results differ",
        metavar="FILE.json",
    )
    overwrite: bool = option(False, "let --output and --save-maps replace files that exist")
    resume: bool = option(
        False, "continue a run that was stopped or killed; the other options stay the same"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.data is None or self.checkpoint is None:
            raise InputError("give DATA and --checkpoint DIR")
        if self.resume and self.output is None:
            raise InputError("--resume needs --output FILE.json, where finished pictures are saved")
        if not self.scales:
            raise InputError("--scales needs at least one number")
        if self.where_truth == NONE and self.save_maps is None:
            raise InputError("--truth none leaves nothing to measure; add --save-maps DIR")

    @property
    def where_truth(self) -> str | None:
        """The folder of the truth, or "none"; None: beside the pictures."""
        return self.truth.truth  # pyright: ignore[reportAttributeAccessIssue]


@dataclass(frozen=True)
class SegmentConfig(MapConfig):
    """What to segment, and how; every field is a flag of `hvit segment`."""

    truth: LabelTruth = nested(LabelTruth)


@dataclass(frozen=True)
class DepthConfig(MapConfig):
    """Of what to estimate depth, and how; every field is a flag of `hvit depth`."""

    truth: DepthTruth = nested(DepthTruth)
