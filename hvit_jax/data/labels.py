"""Which of the head's outputs are right for a picture: by names, by order, or from a file."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Int

from hvit_jax.checkpoint import Description
from hvit_jax.data.folder import EXTENSIONS, first_number
from hvit_jax.data.source import Source, Subset
from hvit_jax.errors import InputError
from hvit_jax.fields import Options, option
from hvit_jax.system.files import read_json

Right = tuple[int, ...]  # The outputs that are right for one picture or class.
_ORDER, _NUMBERS = "order", "numbers"
_NAMED = 3  # classes of each side, in a message
# ReaL's labels come as a list, in the order of these files (Beyer et al. 2020, arXiv 2006.07159).
_IMAGENET = "ILSVRC2012_val_{:08d}"


@dataclass(frozen=True)
class Labelling(Options):
    """How pictures get their labels; see docs/data.md.

    Raises:
        InputError: if more than one way is named.
    """

    labels: Path | None = option(
        None,
        "right classes of pictures, instead of class folders: lines NAME,LABEL or NAME LABEL, or "
        "JSON, where a picture may have several or none",
        metavar="FILE",
        group="labels",
    )
    class_map: Path | None = option(
        None,
        "which of the head's outputs each class folder is: JSON, or lines FOLDER,LABEL",
        metavar="FILE",
        group="labels",
    )
    order: bool = option(
        False,
        "class folders in their order are the head's outputs in theirs, whatever their names",
        group="labels",
    )
    subset: bool = option(
        False,
        "only outputs of classes that the data has compete, as usual for ImageNet-A and -R",
        group="labels",
    )

    def __post_init__(self):
        super().__post_init__()
        ways = {"--labels": self.labels, "--class-map": self.class_map, "--order": self.order}
        given = [flag for flag, value in ways.items() if value]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} contradict each other; give one of them")


@dataclass(frozen=True)
class Labelled:
    """Pictures whose labels are numbers of the head's outputs.

    Attributes:
        source: the pictures that have a label.
        right: the right output of every picture; where some have several, a row of them each,
            filled up with -1.
        outputs: those that compete, ascending; None for all.
        names: of every output; its number where nothing names it.
        by: how the labels were made.
        notes: what a user should know of that.
    """

    source: Source
    right: Int[np.ndarray, "N ..."]
    outputs: tuple[int, ...] | None
    names: tuple[str, ...]
    by: str
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Say how labels were made, as results do, and name them and the outputs by content."""
        numbers = (self.right, np.array(self.outputs or (), np.int32))
        content = b"".join(array.astype("<i4").tobytes() for array in numbers)
        about = {
            "by": self.by,
            "outputs": len(self.outputs or self.names),
            "notes": list(self.notes),
        }
        return {"labels": about, "labels_sha256": hashlib.sha256(content).hexdigest()}


def label_pictures(
    source: Source, description: Description, labelling: Labelling = Labelling()
) -> Labelled:
    """Find the right outputs of pictures.

    Args:
        source: the pictures; with `labelling.labels` its own labels do not count.
        description: of the checkpoint whose outputs they are.
        labelling: how; by default names decide, where the checkpoint names its classes.

    Raises:
        InputError: if the checkpoint has no head, labels cannot be read, or do not fit the head.
    """
    outputs, kept = description.config.num_classes, range(len(source))
    if not outputs:
        raise InputError(
            "the checkpoint has no classification head; evaluate a fine-tuned one, such as SWAG's "
            "*_in1k files"
        )
    if labelling.labels is not None:
        right, notes = _from_file(labelling.labels, source.paths, description)
        kept = [place for place, each in enumerate(right) if each]
        if not kept:
            raise InputError(f"{labelling.labels} has no right label for any picture")
        right, by = [right[place] for place in kept], f"the file {labelling.labels.name}"
        there = set().union(*right)
    else:
        of_class, by, notes = _of_classes(source.classes, description, labelling)
        right = [of_class[label] for label in source.labels]
        there = set().union(*of_class)
    in_order = by in (_ORDER, _NUMBERS)
    names = description.classes or (source.classes if in_order else map(str, range(outputs)))
    competing = None
    if len(there) < outputs:
        if labelling.subset:
            competing = tuple(sorted(there))
            notes.append(f"only outputs of the data's {len(there)} classes compete, of {outputs}")
        else:
            notes.append(
                f"the data has {len(there)} of the head's {outputs} classes; all outputs compete "
                "(with --subset only theirs)"
            )
    pictures = source if len(kept) == len(source) else Subset(source, tuple(kept))
    return Labelled(pictures, _as_array(right), competing, tuple(names), by, tuple(notes))


def _as_array(right: Sequence[Right]) -> Int[np.ndarray, "N ..."]:
    most = max(map(len, right))
    if most == 1:
        return np.asarray(right, np.int32)[:, 0]
    rows = np.full((len(right), most), -1, np.int32)
    for row, each in zip(rows, right, strict=True):
        row[: len(each)] = each
    return rows


def _of_classes(
    classes: Sequence[str], description: Description, labelling: Labelling
) -> tuple[list[Right], str, list[str]]:
    """Find the right outputs of every class, say how, and what a user should know."""
    outputs, known = description.config.num_classes, description.classes
    if labelling.class_map is not None:
        table = _Labels(labelling.class_map, description)
        missing = [name for name in classes if name not in table]
        if missing:
            raise InputError(f"{table.path} does not have {_some(missing)}")
        return [table[name] for name in classes], f"the file {table.path.name}", []
    if known and set(classes) <= set(known) and not labelling.order:
        return [(known.index(name),) for name in classes], "names", []
    if len(classes) != outputs:
        raise InputError(
            f"the data has {len(classes)} classes, the checkpoint's head has {outputs}"
            f"{difference(classes, known)}; --class-map FILE says which output each folder is"
        )
    in_order: list[Right] = [(place,) for place in range(outputs)]
    if labelling.order:
        return in_order, _ORDER, []
    start = first_number(classes)
    if known and start != 0:
        raise InputError(
            f"the data's class names are not the checkpoint's{difference(classes, known)}; "
            "--class-map FILE says which output each folder is, --order takes both in their order"
        )
    if start is None:
        return in_order, _ORDER, []
    notes = []
    if known:
        notes = [f"class folders {classes[0]} to {classes[-1]} are taken as the outputs' numbers"]
    elif start == 1:
        notes = [
            f"class folders {classes[0]} to {classes[-1]} go by number: {classes[0]} is the head's "
            "first output (another order: --class-map FILE)"
        ]
    return in_order, _NUMBERS, notes


def difference(classes: Sequence[str], known: Sequence[str]) -> str:
    """Say which names one side alone has, where both have names."""
    sides = {"data": set(classes) - set(known), "checkpoint": set(known) - set(classes)}
    parts = [
        f"only the {side} has {_some(sorted(names))}" for side, names in sides.items() if names
    ]
    return f" ({', '.join(parts)})" if known else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def _from_file(
    path: Path, pictures: Sequence[str], description: Description
) -> tuple[list[Right], list[str]]:
    """Find the right outputs of pictures in a file, and what a user should know.

    Pictures are found by their path or the end of it, with or without their extension.
    """
    table = _Labels(path, description)
    found: dict[str, str] = {}
    right, missing = [], []
    for picture in pictures:
        name = next((name for name in _names(picture) if name in table), None)
        if name is None:
            missing.append(picture)
            continue
        if name in found:
            raise InputError(
                f"{path}: {name} is both {found[name]} and {picture}; write their folders too"
            )
        found[name] = picture
        right.append(table[name])
    if missing:
        raise InputError(
            f"{path} has no label for {len(missing)} of {len(pictures)} pictures: {_some(missing)}"
        )
    without = sum(not each for each in right)
    notes = [f"left out: pictures without a right label ({without})"] if without else []
    if len(table) > len(found):
        notes.append(f"{path.name} names {len(table) - len(found)} pictures that are not here")
    return right, notes


def _names(picture: str) -> Iterable[str]:
    """List the names by which a file may call a picture, the longest first."""
    parts = PurePath(picture).parts
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    return [*ends, *(end.rpartition(".")[0] for end in ends)]


class _Labels(Mapping[str, Right]):
    """Labels of a file by name, as numbers of outputs."""

    def __init__(self, path: Path, description: Description):
        """Read the file: JSON, or lines.

        Raises:
            InputError: if it cannot be read so.
        """
        self.path = path
        self._outputs = description.config.num_classes
        self._places = {name: place for place, name in enumerate(description.classes)}
        self._found = self._read_json() if path.suffix.lower() == ".json" else self._read_lines()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, name: str) -> Right:
        return tuple(dict.fromkeys(self._checked(label, name) for label in self._found[name]))

    def _checked(self, label: Any, name: str) -> int:
        """Turn a label, a number or the name of a class, into the number of an output."""
        number = self._number(label)
        if number is None:
            raise InputError(
                f"{self.path}: the label {label!r} of {name} is no number and no class of the "
                "checkpoint"
            )
        if not 0 <= number < self._outputs:
            raise InputError(
                f"{self.path}: the label {number} of {name}: outputs are 0 to {self._outputs - 1}"
            )
        return number

    def _number(self, label: Any) -> int | None:
        if isinstance(label, str):
            number = int(label) if label.isascii() and label.isdecimal() else None
            return self._places.get(label, number)
        return label if isinstance(label, int) and not isinstance(label, bool) else None

    def _read_json(self) -> dict[str, list[Any]]:
        """Read `{NAME: LABEL or [LABEL, ...]}`, or ReaL's list."""
        content = read_json(self.path, lists=True)
        if isinstance(content, list):
            content = {_IMAGENET.format(place): each for place, each in enumerate(content, 1)}
        return {name: each if isinstance(each, list) else [each] for name, each in content.items()}

    def _read_lines(self) -> dict[str, list[str]]:
        """Read `NAME,LABEL` or `NAME LABEL` a line; a line of titles above them is left out."""
        try:
            lines = self.path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path} is no text file") from error
        found: dict[str, list[str]] = {}
        for place, line in enumerate(filter(str.strip, lines)):
            row = next(csv.reader([line])) if "," in line else line.rsplit(None, 1)
            name, *labels = map(str.strip, row)
            titles = not place and not name.lower().endswith(EXTENSIONS)
            if titles and all(self._number(label) is None for label in labels):
                continue
            if not labels:
                raise InputError(f"{self.path}: expected NAME,LABEL in each line, got {line!r}")
            if found.setdefault(name, labels) != labels:
                raise InputError(f"{self.path} has two labels for {name}")
        return found
