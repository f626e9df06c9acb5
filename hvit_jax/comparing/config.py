"""What `hvit compare` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvit_jax.data.labels import Labelling
from hvit_jax.dense.config import DepthTruth, LabelTruth
from hvit_jax.errors import InputError
from hvit_jax.evaluation.config import Classifying, OnPictures
from hvit_jax.fields import nested, option
from hvit_jax.models.reducer import Reducer
from hvit_jax.pictures import Windows
from hvit_jax.reducers import REDUCERS, method_class

METHODS = tuple(name for name in REDUCERS if name != Reducer.name)


@dataclass(frozen=True)
class CompareConfig(OnPictures):
    """What to compare, and how; every field is a flag of `hvit compare`.

    `verify` is the command's: it compares the scores of that file with new ones.

    Raises:
        InputError: for values that are wrong or do not go together.
    """

    # The others' default does not suit windows.
    batch_size: int | None = option(  # pyright: ignore[reportIncompatibleVariableOverride]
        None,
        "pictures at once, of all devices together; windows of models that make maps (default: 64 "
        "pictures, or 8 windows)",
        short="-b",
        least=1,
    )
    labelling: Labelling = nested(Labelling)
    unlabelled: bool = option(
        False,
        "leave labels and truth aside; compare with what the dense model says",
        group="labels",
    )
    classifying: Classifying = nested(Classifying)
    truth: LabelTruth = nested(LabelTruth, leave=("exif",))
    depth: DepthTruth = nested(DepthTruth, leave=("truth", "split", "exif"))
    windows: Windows = nested(Windows)
    restore: str | None = option(
        None,
        "of models that make maps, where a method's tokens become the full grid (default: the "
        "checkpoint's, else the first that the method can do)",
        choices=("masks", "tokens"),
    )
    methods: tuple[str, ...] = option(
        METHODS,
        "methods to compare, or two with + between for the chain of both, beside dense and dense "
        "at a lower resolution",
        metavar="LIST",
    )
    levels: tuple[float, ...] = option(
        (0.8, 0.6, 0.4),
        "shares of the dense model's multiply-adds: of each method the setting is tried that comes "
        "nearest to each from below",
        above=0,
        most=1,
    )
    candidates: bool = option(
        False, "try all settings that the methods propose, in place of those at --levels"
    )
    target_speedup: float | None = option(
        None,
        "name the best setting with at least X times the dense model's images/s",
        above=1,
        most=1000,
    )
    max_drop: float | None = option(
        None,
        "name the fastest setting that loses at most so much of the first score (default: 1 "
        "percentage point, 5 without labels, or 5 % of the RMSE)",
        least=0,
        most=100,
        metavar="POINTS",
    )
    pictures: int = option(500, "size of the sample, taken at even distances over DATA", least=2)
    seconds: float = option(
        0.1, "length of each of the five rounds of timing, about", above=0, most=3600, metavar="S"
    )
    output: tuple[Path, ...] = option(
        (),
        "write the results: .json and .csv after every setting, .html as a report at the end; may "
        "be repeated",
        short="-o",
        metavar="FILE",
        ends=(".json", ".csv", ".html"),
    )
    drawn: int = option(3, "pictures that the report shows; 0: none", least=0, most=20)
    resume: bool = option(False, "continue with the settings of --output FILE.json")
    verify: Path | None = option(
        None,
        "measure the scores in this file again and compare; exit status 1 if they differ",
        metavar="FILE.json",
        ends=(".json",),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.target_speedup is not None and self.max_drop is not None:
            raise InputError("give --target-speedup X or --max-drop POINTS, not both")
        if self.verify is not None and (self.output or self.resume):
            raise InputError("--verify writes nothing; leave out --output and --resume")
        if not self.methods:
            raise InputError("--methods names no method")
        if not self.levels:
            raise InputError("--levels needs at least one number")
        if len(set(self.levels)) < len(self.levels):
            raise InputError("--levels names a share twice")
        if self.unlabelled and (self.labelling.labels or self.truth.truth):
            raise InputError("--unlabelled leaves aside what --labels and --truth name")
        for method in self.methods:
            if method == Reducer.name:
                raise InputError("--methods lists what to try beside dense, which is always tried")
            method_class(method)
